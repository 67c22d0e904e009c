"""Idefics 2, Idefics 3 and SmolVLM: every picture, crops included, has the same number of tokens."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from catp_lightning.models.towers import Tower, Towered, in_squares, of_first_beams
from catp_lightning.prompt.prompt import DecoderPrompt
from catp_lightning.utils.on_cpu import on_cpu


class Idefics(Towered):
    """Idefics 2, Idefics 3 and its small descendant SmolVLM.

    The connector makes a token of a square of patches, but for Idefics 2, whose resampler's tokens stand for none.
    """

    types = ("idefics2", "idefics3", "smolvlm")
    classes = (
        "Idefics2ForConditionalGeneration",
        "Idefics3ForConditionalGeneration",
        "SmolVLMForConditionalGeneration",
    )

    @property
    def pixel_readers(self) -> tuple[nn.Module, ...]:
        return (self.model.model.vision_model,)

    @property
    def has_grid(self) -> bool:
        return bool(self.model.config.model_type != "idefics2")

    @property
    def towers(self) -> Sequence[Tower]:
        tower: Any = self.model.model.vision_model
        if not self.has_grid:
            return []
        return [Tower(tower, [block.self_attn for block in tower.encoder.layers])]

    def of_patches(self, kind: str, value: Tensor, prompt: DecoderPrompt) -> list[Tensor]:
        """Return the values of each picture's tokens; pictures of zeros, which pad a batch, do not reach the tower."""
        side, square = math.isqrt(value.shape[2]), int(self.model.config.scale_factor)
        tokens = (side // square) ** 2
        pictures = (on_cpu(prompt.ids)[0] == self.kinds(prompt.arguments)[kind]).sum(1) // tokens  # of each sample
        own = of_first_beams(value, pictures.tolist(), 0)
        return [in_squares(picture, (side, side), square) for picture in own]
