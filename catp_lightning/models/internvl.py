"""InternVL: an image is cut into tiles, each with the same number of tokens."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from catp_lightning.models.images import Images, equal_images, joined
from catp_lightning.models.towers import Tower, Towered, in_squares, of_pictures
from catp_lightning.prompt.prompt import DecoderPrompt
from catp_lightning.utils.on_cpu import on_cpu


class InternVL(Towered):
    """InternVL, as Hugging Face has it: a square of patches makes a token."""

    types = ("internvl",)
    classes = ("InternVLForConditionalGeneration",)

    @property
    def pixel_readers(self) -> tuple[nn.Module, ...]:
        return (self.model.model.vision_tower,)

    @property
    def towers(self) -> Sequence[Tower]:
        config: Any = self.model.config
        if config.vision_config.model_type != "internvl_vision" or config.vision_feature_select_strategy != "default":
            return []  # it is not known to have a [CLS] that is left out
        tower, layer = self.model.model.vision_tower, config.vision_feature_layer
        blocks = [block.attention for block in tower.encoder.layer]
        return [Tower(tower, blocks[: layer if layer >= 0 else len(blocks) + layer + 1], has_class=True)]

    def of_patches(self, kind: str, value: Tensor, prompt: DecoderPrompt) -> list[Tensor]:
        side, square = math.isqrt(value.shape[2]), round(1 / self.model.config.downsample_ratio)
        tiles = [in_squares(tile, (side, side), square) for tile in of_pictures(value, prompt.arguments)]
        return [torch.cat(tiles[image], 1) for image in self._tiles(prompt, len(tiles))]

    def images(self, prompt: DecoderPrompt, counts: Mapping[int, int]) -> Images:
        """Return images by placeholder id; the tiles of one image stand in one run of placeholders."""
        found = equal_images(self.model, prompt, counts)
        return {
            token: [joined(tiles[image]) for image in self._tiles(prompt, len(tiles))] for token, tiles in found.items()
        }

    def _tiles(self, prompt: DecoderPrompt, count: int) -> list[slice]:
        """Return which of `count` tiles belong to each image."""
        columns = (on_cpu(prompt.ids)[0] == self.model.config.image_token_id).flatten().nonzero()[:, 0].tolist()
        each = len(columns) // max(count, 1)
        starts = [
            tile
            for tile, place in enumerate(range(0, each * count, each or 1))
            if not tile or columns[place] != columns[place - 1] + 1 or columns[place] % prompt.ids.shape[1] == 0
        ]
        return [slice(start, end) for start, end in zip(starts, [*starts[1:], count], strict=True)]
