"""Cosmos 3 and Cohere Compass: images as in Qwen-VL."""

from catp_lightning.models.gridded import Gridded


class Compass(Gridded):
    """Cohere Compass, laid out as Qwen3-VL."""

    types = ("cohere_compass",)
    classes = ("CohereCompassForConditionalGeneration",)


class Cosmos(Gridded):
    """Cosmos 3, Edge and Omni."""

    types = ("cosmos3_edge", "cosmos3_omni")
    classes = ("Cosmos3EdgeForConditionalGeneration", "Cosmos3OmniForConditionalGeneration")
    tower = "visual"
    channels_first = False
