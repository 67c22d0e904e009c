"""Images and the visual tokens that a model makes of them, for the ways in which several families cut and pad them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from catp_lightning.errors import PruningError
from catp_lightning.prompt.prompt import DecoderPrompt
from catp_lightning.utils.on_cpu import on_cpu, taken


@dataclass(frozen=True)
class Part:
    """Part of an image that has a grid of its own: all of it, a crop or a tile.

    Attributes:
        rows, columns: size of its grid of patches; 0 if none of its tokens stands for a patch.
        picture: float [C, H, W], C is 1 or 3: the pixels under that grid, as the vision part reads them; None: how they
            lie is not known.
        at: row and column of the part among the parts of its image, where these are laid out side by side.
    """

    rows: int
    columns: int
    picture: Tensor | None
    at: tuple[int, int]


@dataclass(frozen=True)
class Image:
    """Image, or frame of a video, and the visual tokens that a model makes of it.

    Attributes:
        tokens: number of its placeholders.
        pixels: its own pixels, of any shape, without padding: they identify it.
        protected: bool [tokens] on the CPU, tokens that stand for no patch and always stay; None: there are none.
        crops: int64 [tokens] on the CPU, the crop that each token is of; None if the image is not cut.
        shape: rows and columns of its patches; None: a square of each crop where their number allows one.
        patches: int64 [tokens] on the CPU, number of each token's patch, line by line; None: all, in their order.
    """

    tokens: int
    pixels: Tensor
    protected: Tensor | None = None
    crops: Tensor | None = None
    shape: tuple[int, int] | None = None
    patches: Tensor | None = None

    def places(self) -> Tensor:
        """Return part, row and column of each token's patch: int64 [tokens, 3], row and column -1 if it has none.

        Each crop is a part of its own. But if line ends stand among the crops beyond the first, which is the whole
        image, those crops make one picture together. Patches whose grid is not known are one line.
        """
        ends = torch.zeros(self.tokens, dtype=torch.bool, device="cpu") if self.protected is None else self.protected
        part = torch.zeros(self.tokens, dtype=torch.int64, device="cpu") if self.crops is None else self.crops
        if stitched := bool((ends & (part.cummax(0).values > 0)).any()):
            part = part.clamp(max=1)
        found = torch.stack([part, torch.full_like(part, -1), torch.full_like(part, -1)], 1)
        for number in part.unique().tolist():
            own = (part == number) & ~ends
            index = torch.arange(int(own.sum()), dtype=torch.int64, device="cpu")
            if stitched and number:
                row = ends.cumsum(0)[own]
                row = row - row[:1]
                column = index - (row[:, None] > row).sum(1)
            else:
                columns = (self.shape or _square(len(index)))[1]
                place = index if self.patches is None else self.patches
                row, column = place // columns, place % columns
            found[own, 1], found[own, 2] = row, column
        return found

    def parts(self) -> list[Part]:
        """Return the parts that `places` numbers, side by side, with their pixels."""
        places, pictures = self.places(), self.pictures()
        found = []
        for number in range(int(places[:, 0].max()) + 1 if self.tokens else 0):
            own = places[places[:, 0] == number, 1:]
            rows, columns = (own.amax(0) + 1).tolist() if len(own) else (0, 0)
            if self.shape is not None and rows:
                rows, columns = self.shape  # the last lines may have lost all their tokens
            found.append(Part(rows, columns, pictures[number] if number < len(pictures) else None, (0, number)))
        return found

    def pictures(self) -> list[Tensor]:
        """Return the pixels of each part, float [C, H, W]; empty where it is not known how they lie."""
        pixels = self.pixels if self.crops is not None else self.pixels[None]
        return list(pixels) if pixels.dim() == 4 and pixels.shape[1] in (1, 3) else []


def _square(patches: int) -> tuple[int, int]:
    """Return rows and columns of a square of patches, or of one line if their number is not a square."""
    side = math.isqrt(patches)
    return (side, side) if side * side == patches else (1, max(1, patches))


Images = dict[int, list[Image]]
"""Images and frames by placeholder id, in the order of their features."""


def joined(crops: Sequence[Image]) -> Image:
    """Return the image that consists of `crops`, whose tokens stand in one run."""
    sizes = torch.tensor([crop.tokens for crop in crops], device="cpu", dtype=torch.int64)
    numbers = torch.arange(len(crops), device="cpu", dtype=torch.int64).repeat_interleave(sizes)
    return Image(len(numbers), torch.stack([crop.pixels for crop in crops]), crops=numbers)


def pictures(arguments: Mapping[str, Any]) -> Tensor | None:
    """Return the pixels of the images in a call's arguments, or None.

    Video-LLaVA has another name for them, `pixel_values_images`.
    """
    pixels = arguments.get("pixel_values")
    return arguments.get("pixel_values_images") if pixels is None else pixels


def equal_images(model: Any, prompt: DecoderPrompt, counts: Mapping[int, int]) -> Images:
    """Return the images of a model that makes the same number of tokens of every picture its vision part reads.

    `counts` are numbers of placeholders by id.

    Raises:
        PruningError: the pictures cannot share the placeholders equally.
    """
    token = int(model.config.image_token_id)
    pixels = pictures(prompt.arguments)
    if pixels is None:
        return {}
    if pixels.dim() == 5:  # pictures of each sample, padded with pictures of zeros
        filled = prompt.arguments.pictures
        filled = on_cpu(pixels.flatten(2).any(2))[0] if filled is None else filled
        pixels = taken(pixels, filled)
    each, rest = divmod(counts[token], len(pixels))
    if rest:
        raise PruningError(
            f"{len(pixels)} pictures share {counts[token]} image tokens, which is not a whole number each. Give each "
            "sample as many image tokens as its images need; its processor does."
        )
    return {token: [Image(each, picture) for picture in pixels]}


def sized_images(model: Any, prompt: DecoderPrompt, counts: Mapping[int, int]) -> Images:
    """Return the images of Mistral 3, LightOnOCR and Pixtral: of their own size, padded to the largest.

    The call's argument `image_sizes` [I, 2] gives heights and widths in pixels.
    """
    pixels, sizes = pictures(prompt.arguments), prompt.arguments.get("image_sizes")
    if pixels is None or sizes is None:
        return {}
    side = model.config.vision_config.patch_size * getattr(model.config, "spatial_merge_size", 1)
    return {
        int(model.config.image_token_id): [
            Image(
                (height // side) * (width // side),
                picture[:, :height, :width],
                shape=(height // side, width // side),
            )
            for picture, (height, width) in zip(
                pixels, (sizes.tolist() if isinstance(sizes, Tensor) else sizes), strict=True
            )
        ]
    }


def video_frames(model: Any, prompt: DecoderPrompt, protected_first: bool = False, closing: int = 0) -> Images:
    """Return the frames of a call's videos, which all have the same number of frames.

    Args:
        model: the Hugging Face model.
        prompt: the prompts that they belong to.
        protected_first: True if each frame begins with a token that stands for no patch, its [CLS].
        closing: number of tokens that end a video; they stand for no patch and count to its last frame.
    """
    videos = prompt.arguments.get("pixel_values_videos")
    if videos is None:
        return {}
    token = int(model.config.video_token_id)
    tokens, frames = int((on_cpu(prompt.ids)[0] == token).sum()) // len(videos), videos.shape[1]
    each = (tokens - closing) // frames
    protected = torch.arange(each, device="cpu") == 0 if protected_first else None
    found = [Image(each, frame, protected) for video in videos for frame in video]
    if closing:
        ends = torch.arange(each + closing, device="cpu") >= each
        for last in range(frames - 1, len(found), frames):
            found[last] = Image(each + closing, found[last].pixels, ends)
    return {token: found}
