"""Gemma 3, Gemma 4 and PaliGemma. Images of Gemma 4 keep their own size; others have equally many tokens."""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from catp_lightning.models.images import Image, Images
from catp_lightning.models.placeholder import Placeholder
from catp_lightning.models.towers import Tower, Towered, in_squares, known_tower, of_pictures
from catp_lightning.prompt.prompt import DecoderPrompt
from catp_lightning.utils.on_cpu import on_cpu, taken


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

    def positions(self, mask: Tensor, past: int = 0) -> Tensor:
        return super().positions(mask, past) + 1


class Gemma4(Placeholder):
    """Gemma 4."""

    types = ("gemma4", "gemma4_unified")
    classes = ("Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration")

    def images(self, prompt: DecoderPrompt, counts: Mapping[int, int]) -> Images:
        """Return images and frames by placeholder id.

        The call's arguments are `pixel_values` [I, patches, D] and `image_position_ids` [I, patches, 2], column and
        row of each patch, -1 for padding; of frames `pixel_values_videos` and `video_position_ids`, by video in older
        versions of transformers. A square of patches makes a token, but in Gemma 4 Unified each patch is one.
        """
        config, given, found = self.model.config, prompt.arguments, Images()
        side = 1 if config.model_type == "gemma4_unified" else config.vision_config.pooling_kernel_size
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            pixels, places = given.get(name), given.get(f"{kind}_position_ids")
            if pixels is None or places is None:
                continue
            found[int(getattr(config, f"{kind}_token_id"))] = [
                Image(
                    int(real.sum()) // side**2,
                    taken(patches, real),
                    shape=((int(own[:, 1].max()) + 1) // side, (int(own[:, 0].max()) + 1) // side),
                )
                for patches, own in zip(pixels.flatten(0, -3), on_cpu(places)[0].flatten(0, -3), strict=True)
                for real in [(own != -1).all(-1)]
            ]
        return found
