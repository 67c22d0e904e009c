"""ERNIE 4.5 VL: images as in Qwen-VL, and experts of its own for visual rows; two frames of a video are joined."""

from catp_lightning.models.gridded import Gridded


class Ernie(Gridded):
    """ERNIE 4.5 VL."""

    types = ("ernie4_5_vl_moe",)
    classes = ("Ernie4_5_VLMoeForConditionalGeneration",)
    frames_joined = 2
