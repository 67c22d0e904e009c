"""Kimi K2.5, Muse Glimmer and Muse Spark: images as in Qwen-VL, whose squares of patches have names of their own."""

from collections.abc import Mapping
from typing import Any

from catp_lightning.models.gridded import Gridded


class Kimi(Gridded):
    """Kimi K2.5, whose videos fail in transformers itself unless they have one step of time."""

    types = ("kimi_k25",)
    classes = ("Kimi_K25ForConditionalGeneration",)

    def sides(self, kind: str, arguments: Mapping[str, Any], count: int) -> list[int]:
        return [self.model.config.vision_config.merge_kernel_size[0]] * count


class Muse(Gridded):
    """Muse Glimmer and Muse Spark."""

    types = ("muse_glimmer", "muse_spark")
    classes = ("MuseGlimmerForConditionalGeneration", "MuseSparkForConditionalGeneration")
    channels_first = False

    def sides(self, kind: str, arguments: Mapping[str, Any], count: int) -> list[int]:
        return [self.model.config.vision_config.merge_size] * count
