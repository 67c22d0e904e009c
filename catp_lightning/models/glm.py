"""GLM-V: images as in Qwen-VL; frames of videos are marked like images."""

from catp_lightning.models.gridded import Gridded


class GLM(Gridded):
    """GLM-4V and its successors."""

    types = ("glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga")
    classes = (
        "Glm46VForConditionalGeneration",
        "Glm4vForConditionalGeneration",
        "Glm4vMoeForConditionalGeneration",
        "GlmOcrForConditionalGeneration",
    )
    frames_as_images = True
    tower = "visual"
