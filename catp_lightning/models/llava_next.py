"""LLaVA-NeXT and LLaVA-NeXT-Video: an image is cut into crops, whose tokens are packed with line ends."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from catp_lightning.models.images import Image, Images, pictures, video_frames
from catp_lightning.models.llava import Llava
from catp_lightning.models.towers import in_squares, of_first_beams
from catp_lightning.prompt.prompt import DecoderPrompt


@dataclass(frozen=True)
class CutImage(Image):
    """Image whose pixels, [crops, C, S, S], are a picture of the whole and crops that make one picture together.

    Attributes:
        size: height and width of the image before it was resized and padded.
        pinpoints: heights and widths that it may be resized to.
        patch: pixels a side of a patch.
    """

    size: Sequence[int] = ()
    pinpoints: Sequence[Sequence[int]] = ()
    patch: int = 1

    def pictures(self) -> list[Tensor]:
        side = self.pixels.shape[-1] // self.patch  # what is left over at the ends of rows and columns is in no patch
        pixels = self.pixels[..., : side * self.patch, : side * self.patch]
        if len(pixels) == 1:
            return [pixels[0]]
        high, wide = get_anyres_image_grid_shape(self.size, self.pinpoints, self.pixels.shape[-1])
        whole = pixels[1:].unflatten(0, (high, wide)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
        patches = torch.arange(high * wide * side**2, dtype=torch.int64, device="cpu").view(1, high * side, wide * side)
        inside = unpad_image(patches, self.size)[0]
        top, left = divmod(int(inside[0, 0]), wide * side)
        bottom, right = (self.patch * (place + 1) for place in divmod(int(inside[-1, -1]), wide * side))
        return [pixels[0], whole[:, self.patch * top : bottom, self.patch * left : right]]


class LlavaNext(Llava):
    """LLaVA-NeXT and LLaVA-NeXT-Video."""

    types: ClassVar[tuple[str, ...]] = ("llava_next", "llava_next_video")
    classes: ClassVar[tuple[str, ...]] = ("LlavaNextForConditionalGeneration", "LlavaNextVideoForConditionalGeneration")

    @property
    def tokens_per_image(self) -> int | None:
        return None

    def images(self, prompt: DecoderPrompt, counts: Mapping[int, int]) -> Images:
        found = self._videos(prompt)
        if pictures(prompt.arguments) is not None:
            found = {**found, int(self.model.config.image_token_id): self._cut_images(prompt)}
        return found

    def _videos(self, prompt: DecoderPrompt) -> Images:
        return video_frames(self.model, prompt)

    def _cut_images(self, prompt: DecoderPrompt) -> list[Image]:
        """Return images that are cut into crops.

        The model's own packing says where tokens of each crop and line ends come to lie.
        """
        pixels, crops = prompt.arguments["pixel_values"], self._crop_counts(prompt.arguments)
        if pixels.dim() == 5:  # padded to the largest number of crops
            own = [image[:count] for image, count in zip(pixels, crops, strict=True)]
        else:
            own = list(pixels.split(crops))
        places = [torch.eye(count, max(crops), dtype=torch.float32, device="cpu") for count in crops]
        of_crop = [place[:, None].expand(-1, self._patches(), -1) for place in places]
        # A resampled token is of the crop with the largest share.
        sizes, config = prompt.arguments["image_sizes"], self.model.config
        return [
            CutImage(
                len(share),
                image,
                protected=share.sum(1) < 0.5,
                crops=share.argmax(1),
                size=size.tolist() if isinstance(size, Tensor) else size,
                pinpoints=config.image_grid_pinpoints,
                patch=config.vision_config.patch_size,
            )
            for share, image, size in zip(self._packed(of_crop, prompt.arguments), own, sizes, strict=True)
        ]

    def _crop_counts(self, arguments: Mapping[str, Any]) -> list[int]:
        """Return the number of crops of each image, the whole image included."""
        sizes, config, several = arguments["image_sizes"], self.model.config, arguments.get("batch_num_images")
        cut = [True] * len(sizes) if several is None else [n == 1 for n in several for _ in range(n)]
        return [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size) if own else 1
            for size, own in zip(sizes, cut, strict=True)
        ]

    def _packed(self, features: list[Tensor], arguments: Mapping[str, Any]) -> list[Tensor]:
        """Pack values of each patch of each crop as the model packs features.

        Args:
            features: of each image [crops, patches, F].
            arguments: arguments of the model's call.

        Returns:
            Of each image [tokens, F], 0 at line ends.
        """
        newline = features[0].new_zeros(features[0].shape[-1])
        return self.model.model.pack_image_features(features, arguments["image_sizes"], "default", newline)[0]

    def _pooled(self, value: Tensor) -> Tensor:
        """Return means over the patches of each token: the pooler's windows, whatever it takes of them."""
        selected, stride = self._selected(value), self.model.config.spatial_pool_stride
        side = math.isqrt(selected.shape[2])
        return torch.stack([in_squares(frame, (side, side), stride) for frame in selected])

    def _of_images(self, value: Tensor, arguments: Mapping[str, Any]) -> list[Tensor]:
        counts = self._crop_counts(arguments)
        crops = of_first_beams(self._selected(value), counts, 0).transpose(1, 2).split(counts)
        return [packed.T for packed in self._packed(list(crops), arguments)]
