"""EXAONE 4.5: images as in Qwen-VL."""

from catp_lightning.models.gridded import Gridded


class Exaone(Gridded):
    """EXAONE 4.5."""

    types = ("exaone4_5",)
    classes = ("Exaone4_5_ForConditionalGeneration",)
    tower = "visual"
