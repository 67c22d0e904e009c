"""MiniMax M3: images as in Qwen-VL."""

from catp_lightning.models.gridded import Gridded


class MiniMax(Gridded):
    """MiniMax M3 with vision."""

    types = ("minimax_m3_vl",)
    classes = ("MiniMaxM3SparseForConditionalGeneration",)
