"""Assignment of placeholders to images, for every way in which models cut, pad and pool images."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from catp_lightning.errors import PruningError
from catp_lightning.prompt.prompt import DecoderPrompt
from catp_lightning.utils.hashing import fingerprint


@dataclass(frozen=True)
class Image:
    """Image, or frame of a video, and the visual tokens that a model makes of it.

    Attributes:
        tokens: number of its placeholders.
        pixels: its own pixels, of any shape, without padding: they identify it.
        protected: bool [tokens], tokens that stand for no patch and always stay; None: there are none.
        crops: int64 [tokens], the crop that each token is of; None if the image is not cut.
        shape: rows and columns of its patches; None: a square of each crop where their number allows one.
        patches: int64 [tokens], number of each token's patch, line by line; None: all patches, in their order.
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
        ends = (
            torch.zeros(self.tokens, dtype=torch.bool, device="cpu") if self.protected is None else self.protected.cpu()
        )
        part = torch.zeros(self.tokens, dtype=torch.int64, device="cpu") if self.crops is None else self.crops.cpu()
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
                place = index if self.patches is None else self.patches.cpu()
                row, column = place // columns, place % columns
            found[own, 1], found[own, 2] = row, column
        return found


def _square(patches: int) -> tuple[int, int]:
    """Return rows and columns of a square of patches, or of one line if their number is no square."""
    side = math.isqrt(patches)
    return (side, side) if side * side == patches else (1, max(1, patches))


@dataclass(frozen=True)
class Layout:
    """Images of a batch in the order of their placeholders; I images, T tokens of the largest.

    Attributes:
        images: the image of each row below.
        valid: bool [I, T], tokens that each image has.
        protected: bool [I, T], tokens that stand for no patch and always stay.
        crops: int64 [I, T], the crop that each token is of; None if no image is cut.
    """

    images: Sequence[Image]
    valid: Tensor
    protected: Tensor
    crops: Tensor | None

    @classmethod
    def of(cls, images: Mapping[int, list[Image]], ids: Tensor) -> "Layout":
        """Make a layout of images and the prompts that they belong to.

        Args:
            images: images by placeholder id, in the order of their features.
            ids: int64 [B, L], token ids of the prompts.

        Raises:
            PruningError: images have another number of tokens than there are placeholders.
        """
        found: list[tuple[int, Image]] = []
        for token, own in images.items():
            columns = (ids == token).flatten().nonzero()[:, 0]
            if sum(image.tokens for image in own) != len(columns):
                raise PruningError(
                    f"{len(own)} images have {sum(image.tokens for image in own)} visual tokens, the prompts have "
                    f"{len(columns)} placeholders of id {token}: features would reach the wrong place. Give each "
                    "sample as many image tokens as its images need; its processor does."
                )
            starts = [0, *accumulate(image.tokens for image in own)][:-1]
            found += zip(columns[starts].tolist() if own else [], own, strict=True)
        ordered, device = [image for _, image in sorted(found, key=lambda one: one[0])], ids.device
        widest = max((image.tokens for image in ordered), default=0)
        valid = torch.zeros(len(ordered), widest, dtype=torch.bool, device=device)
        protected, crops = torch.zeros_like(valid), torch.zeros(valid.shape, dtype=torch.long, device=device)
        for row, image in enumerate(ordered):
            valid[row, : image.tokens] = True
            if image.protected is not None:
                protected[row, : image.tokens] = image.protected.to(device)
            if image.crops is not None:
                crops[row, : image.tokens] = image.crops.to(device)
        cut = any(image.crops is not None for image in ordered)
        return cls(ordered, valid, protected, crops if cut else None)

    def padded(self, flat: Tensor) -> Tensor:
        """Regroup values of all visual tokens, in the order of placeholders, by image: [N, ...] -> [I, T, ...]."""
        found = flat.new_zeros(*self.valid.shape, *flat.shape[1:])
        found[self.valid] = flat
        return found

    def samples(self, visual: Tensor) -> Tensor:
        """Return the sample that each image belongs to, int64 [I], given the placeholders `visual`, bool [B, L]."""
        first = self.valid.sum(1).cumsum(0) - self.valid.sum(1)
        return visual.nonzero()[first, 0]

    def tokens(self, values: list[Tensor]) -> Tensor:
        """Stack values of each image's tokens, [..., tokens], padded with zeros to [I, ..., T].

        Raises:
            PruningError: the values are of other numbers of tokens than the images have.
        """
        found = [value.shape[-1] for value in values]
        expected = [image.tokens for image in self.images]
        if found != expected:
            raise PruningError(
                f"The vision part showed images of {found} tokens; the prompts have {expected}. This model selects or "
                "pools patches in a way that is not known: choose a scorer that reads no attention of the vision tower."
            )
        padded = [torch.nn.functional.pad(value, (0, self.valid.shape[1] - value.shape[-1])) for value in values]
        return torch.stack(padded).to(self.valid.device)

    def places(self) -> Tensor:
        """Return part, row and column of each token's patch, as `Image.places`: int64 [I, T, 3], padded with -1."""
        found = [image.places() for image in self.images]
        device, widest = self.valid.device, self.valid.shape[1]
        padded = [torch.nn.functional.pad(places, (0, 0, 0, widest - len(places)), value=-1) for places in found]
        return torch.stack(padded).to(device) if padded else torch.zeros(0, 0, 3, dtype=torch.int64, device=device)

    def fingerprints(self) -> Tensor:
        """Return a checksum of each image's pixels: int64 [I]."""
        return torch.cat([fingerprint(image.pixels[None]) for image in self.images]).to(self.valid.device)


Images = dict[int, list[Image]]
Reader = Callable[[Any, DecoderPrompt, Mapping[int, int]], Images]


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
        pixels = pixels.flatten(0, 1)
        pixels = pixels[pixels.flatten(1).any(1)]
    each, rest = divmod(counts[token], len(pixels))
    if rest:
        raise PruningError(
            f"{len(pixels)} pictures share {counts[token]} image tokens, which is not a whole number each. Give each "
            "sample as many image tokens as its images need; its processor does."
        )
    return {token: [Image(each, picture) for picture in pixels]}


def tiled_images(model: Any, prompt: DecoderPrompt, counts: Mapping[int, int]) -> Images:
    """Return the images of InternVL, where the tiles of one image stand in one run of placeholders."""
    (token, tiles), *_ = equal_images(model, prompt, counts).items() or [(0, [])]
    columns = (prompt.ids == token).flatten().nonzero()[:, 0].tolist()
    images: list[list[Image]] = []
    place = 0
    for tile in tiles:
        joins = place > 0 and columns[place] == columns[place - 1] + 1 and columns[place] % prompt.ids.shape[1] > 0
        images[-1].append(tile) if joins else images.append([tile])
        place += tile.tokens
    return {token: [_joined(own) for own in images]}


def _joined(tiles: list[Image]) -> Image:
    crops = torch.arange(len(tiles), device=tiles[0].pixels.device).repeat_interleave(tiles[0].tokens)
    return Image(len(crops), torch.stack([tile.pixels for tile in tiles]), crops=crops)


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


def gridded_images(model: Any, prompt: DecoderPrompt, counts: Mapping[int, int]) -> Images:
    """Return the images and frames of Qwen-VL and models like it, whose patches lie one image after the other.

    The call's argument `image_grid_thw` [I, 3] counts them by time, height and width; each time step is a frame. A
    square of patches makes a token; its side is given by the config or, in VideoLLaMA 3, by `image_merge_sizes` [I].
    The `video_compression_mask` of VideoLLaMA 3, bool for each token of all videos, says which of them the prompt has.
    """
    config, given = model.config, prompt.arguments
    found: Images = {}
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        pixels, grids = given.get(name), given.get(f"{kind}_grid_thw")
        if pixels is None or grids is None:
            continue
        token = config.image_token_id if config.model_type in IMAGE_TOKEN_ONLY else getattr(config, f"{kind}_token_id")
        sides = given.get(f"{kind}_merge_sizes")
        sides = [config.vision_config.spatial_merge_size] * len(grids) if sides is None else sides.tolist()
        shapes = [
            (height // side, width // side)
            for (time, height, width), side in zip(grids.tolist(), sides, strict=True)
            for _ in range(time)
        ]
        areas = [height * width for time, height, width in grids.tolist() for _ in range(time)]
        stays = given.get("video_compression_mask") if kind == "video" else None
        patches: Sequence[Tensor | None] = [None] * len(shapes)
        if stays is not None:
            patches = [own.nonzero()[:, 0] for own in stays.split([rows * columns for rows, columns in shapes])]
        images = [
            Image(rows * columns if own is None else len(own), part, shape=(rows, columns), patches=own)
            for (rows, columns), own, part in zip(shapes, patches, pixels.split(areas), strict=True)
        ]
        # A frame that resembles the one before may have no token left.
        found[int(token)] = found.get(int(token), []) + [image for image in images if image.tokens]
    return found


# Models whose prompts mark frames of videos like images: by the image token between a start and an end token.
IMAGE_TOKEN_ONLY = {"glm4v", "glm4v_moe", "glm46v", "glm_ocr", "glmga"}
IMAGES: dict[str, Reader] = {
    "internvl": tiled_images,
    **dict.fromkeys(("lighton_ocr", "mistral3"), sized_images),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker"), gridded_images),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe_thinker"), gridded_images),
    **dict.fromkeys(("cosmos3_edge", "cosmos3_omni", "exaone4_5", "hyperclovax_vision_v2"), gridded_images),
    **dict.fromkeys(("minimax_m3_vl", "paddleocr_vl", "video_llama_3", *IMAGE_TOKEN_ONLY), gridded_images),
}
