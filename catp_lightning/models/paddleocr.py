"""PaddleOCR-VL: images as in Qwen-VL."""

from catp_lightning.models.gridded import Gridded


class PaddleOCR(Gridded):
    """PaddleOCR-VL."""

    types = ("paddleocr_vl",)
    classes = ("PaddleOCRVLForConditionalGeneration",)
