"""Granite Docling and Step 3.7: an image is cut into tiles, each with a run of tokens of its own."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from catp_lightning.models.images import Image, Images
from catp_lightning.models.placeholder import Placeholder
from catp_lightning.prompt.prompt import DecoderPrompt
from catp_lightning.utils.on_cpu import on_cpu, taken


class GraniteDocling(Placeholder):
    """Granite Docling, whose tiles have equally many tokens; features are added to them in the first layers."""

    types = ("granite_docling",)
    classes = ("GraniteDoclingForConditionalGeneration",)

    def images(self, prompt: DecoderPrompt, counts: Mapping[int, int]) -> Images:
        """Return tiles by placeholder id: `pixel_values` [B, tiles, C, H, W] where `pixel_attention_mask` is True."""
        token, given = int(self.model.config.image_token_id), prompt.arguments
        if given.get("pixel_values") is None:
            return {}
        tiles = taken(given["pixel_values"], given["pixel_attention_mask"])
        return {token: [Image(counts[token] // max(1, len(tiles)), tile) for tile in tiles]}


class Step(Placeholder):
    """Step 3.7, whose images are read in small tiles first, then whole."""

    types = ("step3p7",)
    classes = ("Step3p7ForConditionalGeneration",)

    def images(self, prompt: DecoderPrompt, counts: Mapping[int, int]) -> Images:
        """Return tiles and whole images by placeholder id: each run of placeholders is one of them.

        The call's arguments are `pixel_values` [I, C, H, W], `pixel_values_local` [tiles, C, H, W] and
        `num_local_patches`, the number of each image's tiles.
        """
        token, given = int(self.model.config.image_token_id), prompt.arguments
        whole, small = given.get("pixel_values"), given.get("pixel_values_local")
        if whole is None:
            return {}
        visual = torch.nn.functional.pad(on_cpu(prompt.ids)[0] == token, (1, 1)).flatten()
        turns = (visual[1:] != visual[:-1]).nonzero()[:, 0]
        sizes = (turns[1::2] - turns[::2]).tolist()
        numbers = given.get("num_local_patches")
        numbers = [0] * len(whole) if numbers is None or small is None else [int(number) for number in numbers]
        tiles = iter(() if small is None else small)
        pixels = [part for image, own in zip(whole, numbers, strict=True) for part in [*_take(tiles, own), image]]
        return {token: [Image(size, part) for size, part in zip(sizes, pixels, strict=True)]}


def _take(tiles: Iterator[Tensor], count: int) -> list[Tensor]:
    return [next(tiles) for _ in range(count)]
