"""Cosmos 3: images as in Qwen-VL."""

from catp_lightning.models.gridded import Gridded


class Cosmos(Gridded):
    """Cosmos 3, Edge and Omni."""

    types = ("cosmos3_edge", "cosmos3_omni")
    classes = ("Cosmos3EdgeForConditionalGeneration", "Cosmos3OmniForConditionalGeneration")
    tower = "visual"
