"""Gemma 3 and PaliGemma: every image has the same number of tokens, which attend to one another."""

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from catp_lightning.models.towers import Tower, Towered, in_squares, known_tower, of_pictures
from catp_lightning.prompt.prompt import DecoderPrompt


class Gemma(Towered):
    """Gemma 3, whose projector pools squares of patches, and ShieldGemma 2, which is one that judges images."""

    types: ClassVar[tuple[str, ...]] = ("gemma3", "shieldgemma2")
    classes: ClassVar[tuple[str, ...]] = ("Gemma3ForConditionalGeneration",)

    @property
    def has_grid(self) -> bool:
        return True

    @property
    def towers(self) -> Sequence[Tower]:
        tower = known_tower(self.model.model.vision_tower)
        return [] if tower is None else [tower]

    @property
    def square(self) -> int:
        """Patches a side of the square that makes a token."""
        vision, tokens = self.model.config.vision_config, math.isqrt(self.model.config.mm_tokens_per_image)
        return int(vision.image_size // vision.patch_size // tokens)

    def of_patches(self, kind: str, value: Tensor, prompt: DecoderPrompt) -> list[Tensor]:
        side = math.isqrt(value.shape[2])
        return [in_squares(image, (side, side), self.square) for image in of_pictures(value, prompt.arguments)]

    @property
    def pixel_readers(self) -> tuple[nn.Module, ...]:
        return (self.model.model.vision_tower,)


class PaliGemma(Gemma):
    """PaliGemma 1 and 2, whose position ids begin at 1 and whose tokens are patches."""

    types = ("paligemma",)
    classes = ("PaliGemmaForConditionalGeneration",)

    @property
    def square(self) -> int:
        return 1

    def positions(self, mask: Tensor) -> Tensor:
        return super().positions(mask) + 1
