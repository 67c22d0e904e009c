"""Assignment of placeholders to the images whose tokens take their places."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from catp_lightning.errors import PruningError
from catp_lightning.models.images import Image
from catp_lightning.utils.hashing import fingerprint
from catp_lightning.utils.on_cpu import on_cpu, on_device, places


@dataclass(frozen=True)
class Layout:
    """Images of a batch in the order of their placeholders; I images, T tokens of the largest.

    Attributes:
        images: the image of each row below.
        order: placeholder id of each image, and its place among the images of that id.
        valid: bool [I, T], tokens that each image has.
        protected: bool [I, T], tokens that stand for no patch and always stay.
        crops: int64 [I, T], the crop that each token is of; None if no image is cut.
    """

    images: Sequence[Image]
    order: Sequence[tuple[int, int]]
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
        found: list[tuple[int, tuple[int, int], Image]] = []
        (own_ids,) = on_cpu(ids)
        for token, own in images.items():
            columns = (own_ids == token).flatten().nonzero()[:, 0]
            if sum(image.tokens for image in own) != len(columns):
                raise PruningError(
                    f"{len(own)} images have {sum(image.tokens for image in own)} visual tokens, the prompts have "
                    f"{len(columns)} placeholders of id {token}: features would reach the wrong place. Give each "
                    "sample as many image tokens as its images need; its processor does."
                )
            starts = [0, *accumulate(image.tokens for image in own)][:-1]
            places = ((token, place) for place in range(len(own)))
            found += zip(columns[starts].tolist() if own else [], places, own, strict=True)
        found.sort(key=lambda one: one[0])
        order, ordered = [place for _, place, _ in found], [image for _, _, image in found]
        widest = max((image.tokens for image in ordered), default=0)
        valid = torch.zeros(len(ordered), widest, dtype=torch.bool, device="cpu")
        protected, crops = torch.zeros_like(valid), torch.zeros(valid.shape, dtype=torch.long, device="cpu")
        for row, image in enumerate(ordered):
            valid[row, : image.tokens] = True
            if image.protected is not None:
                protected[row, : image.tokens] = image.protected
            if image.crops is not None:
                crops[row, : image.tokens] = image.crops
        cut = any(image.crops is not None for image in ordered)
        valid, protected, crops = (on_device(part, ids.device) for part in (valid, protected, crops))
        return cls(ordered, order, valid, protected, crops if cut else None)

    def padded(self, flat: Tensor) -> Tensor:
        """Regroup values of all visual tokens, in the order of placeholders, by image: [N, ...] -> [I, T, ...]."""
        if on_cpu(self.valid)[0].all():
            return flat.unflatten(0, self.valid.shape)
        found = flat.new_zeros(self.valid.numel(), *flat.shape[1:])
        return found.index_copy(0, places(self.valid, flat), flat).unflatten(0, self.valid.shape)

    def samples(self, visual: Tensor) -> Tensor:
        """Return the sample that each image belongs to, int64 [I], given the placeholders `visual`, bool [B, L]."""
        own, valid = on_cpu(visual, self.valid)
        first = valid.sum(1).cumsum(0) - valid.sum(1)
        return on_device(own.nonzero()[first, 0], visual.device)

    def tokens(self, values: Mapping[int, list[Tensor]]) -> Tensor:
        """Stack values of each image's tokens, [..., tokens], padded with zeros to [I, ..., T].

        Args:
            values: values of the images by placeholder id, in the order of their features.

        Raises:
            PruningError: the values are of other numbers of tokens than the images have.
        """
        ordered = [values[token][place] for token, place in self.order if place < len(values.get(token, ()))]
        found = [value.shape[-1] for value in ordered]
        expected = [image.tokens for image in self.images]
        if found != expected:
            raise PruningError(
                f"The vision part showed images of {found} tokens; the prompts have {expected}. This model selects or "
                "pools patches in a way that is not known: choose a scorer that reads no attention of the vision tower."
            )
        padded = [torch.nn.functional.pad(value, (0, self.valid.shape[1] - value.shape[-1])) for value in ordered]
        return torch.stack(padded).to(self.valid.device)

    def places(self) -> Tensor:
        """Return part, row and column of each token's patch, as `Image.places`: int64 [I, T, 3], padded with -1."""
        found = [image.places() for image in self.images]
        device, widest = self.valid.device, self.valid.shape[1]
        padded = [torch.nn.functional.pad(places, (0, 0, 0, widest - len(places)), value=-1) for places in found]
        return on_device(
            torch.stack(padded) if padded else torch.zeros(0, 0, 3, dtype=torch.int64, device="cpu"), device
        )

    def fingerprints(self) -> Tensor:
        """Return a checksum of each image's pixels: int64 [I]."""
        return torch.cat([fingerprint(image.pixels[None]) for image in self.images]).to(self.valid.device)
