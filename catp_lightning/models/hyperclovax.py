"""HyperCLOVA X SEED: images as in Qwen-VL."""

from catp_lightning.models.gridded import Gridded


class HyperCLOVAX(Gridded):
    """HyperCLOVA X SEED with vision, version 2."""

    types = ("hyperclovax_vision_v2",)
    classes = ("HyperCLOVAXVisionV2ForConditionalGeneration",)
    tower = "vision_model"
