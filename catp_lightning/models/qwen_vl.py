"""Qwen-VL: patches of images and frames in a grid, which multimodal rotary positions count by time, row and column."""

from catp_lightning.models.gridded import Gridded


class QwenVL(Gridded):
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5, and the thinkers of Qwen2.5-Omni and Qwen3-Omni."""

    types = (
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen2_5_omni_thinker",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_vl",
        "qwen3_vl_moe",
        "qwen3_omni_moe_thinker",
    )
    classes = (
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5OmniThinkerForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
    )
    tower = "visual"
