"""Keeps what stands out in windows of the image, and the highest scores, and merges the rest (VScan, 2505.22654)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.selection import Selection
from catp_lightning.methods.selectors.base import Selector, ranked
from catp_lightning.methods.selectors.similarity import most_similar


@dataclass(frozen=True)
class VScan(Selector):
    """VScan's first stage, as in its code: keeps tokens by a local and a global scan, and merges the others into them.

    The local scan gives half of the budget, rounded down, to windows of `window` x `window` tokens, the same number to
    each, and keeps of each window the tokens with the most attention in an early layer of the vision tower: the sixth
    of LLaVA-1.5's 23 that lead to the features, of other towers the one as far in. The global scan gives the rest of
    the budget to the highest scores; the authors' are those of the scorer "fastervlm". Each token that is left is
    merged into the kept one most similar to it (cosine of the tokens as they leave the vision part); a kept token
    becomes the mean of all that are merged into it, itself included. Where an image's sides are no multiples of
    `window` its last windows are smaller. The authors' code for LLaVA reads images of 24 x 24 tokens, and keeps fewer
    than the budget where the windows do not share their half evenly; here the global scan has the rest.

    Attributes:
        window: side of a window, in tokens, at least 1.
        layer: layer of the tower that the local scan reads, counted from 0; None: all are observed to find it.
    """

    nested: ClassVar[bool] = False
    merges: ClassVar[bool] = True
    compares: ClassVar[bool] = True

    window: int = 6
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window is {self.window}; it is the side of a window in tokens, at least 1.")
        if self.per == "sample":
            raise ValueError('per is "sample"; windows are those of one image: "image" or "crop".')

    @property
    def needs(self) -> Needs:
        layers = None if self.layer is None else (self.layer,)
        return {Signal.VISION_ATTENTION: layers, Signal.PATCH_POSITION: None, Signal.IMAGE_FEATURES: None}

    def vectors(self, seen: Observation) -> Tensor:
        """Early attention, part, row and column, and features of each token: float [I, T, 4 + D]."""
        layer = (seen.layers[Signal.VISION_ATTENTION] - 1) // 4 if self.layer is None else self.layer
        attention = seen.by_layer(Signal.VISION_ATTENTION, (layer,)).mean((1, 2))[..., None]
        features, places = seen[Signal.IMAGE_FEATURES], seen[Signal.PATCH_POSITION]
        dtype = torch.promote_types(torch.promote_types(features.dtype, attention.dtype), torch.float32)
        return torch.cat([attention.to(dtype), places.to(dtype), features.to(dtype)], -1)

    def select(self, scores: Tensor, visual: Tensor, counts: Tensor, vectors: Tensor | None) -> Selection:
        assert vectors is not None  # `vectors` above always gives some
        local = self._local(visual, counts, vectors)
        left = visual & ~local
        keep = local | (left & (ranked(scores, left) < (counts - local.sum(1))[:, None]))
        nearest = most_similar(vectors[..., 4:], keep)
        itself = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
        lost = ~visual | ~keep.any(1, keepdim=True)
        return Selection(keep, itself.where(keep, nearest).masked_fill(lost, -1))

    def _local(self, visual: Tensor, counts: Tensor, vectors: Tensor) -> Tensor:
        """Mask of the tokens that the local scan keeps: bool [R, T]."""
        part, line, column = vectors[..., 1], vectors[..., 2], vectors[..., -1 if vectors.shape[2] < 4 else 3]
        there = visual & (line >= 0)  # others stand for no patch
        own = torch.stack([part, line // self.window, column // self.window], -1).masked_fill(~there[..., None], -1)
        place = _place_in_group(own, ranked(vectors[..., 0], there))
        windows = (there & (place == 0)).sum(1)
        each = counts // 2 // windows.clamp(min=1)
        return there & (place < each[:, None])


def _place_in_group(group: Tensor, order: Tensor) -> Tensor:
    """Return how many tokens of a token's own group come before it.

    Args:
        group: float [R, T, G], what is equal for tokens of one group.
        order: int64 [R, T], the order of a row's tokens, all different.

    Returns:
        int64 [R, T].
    """
    at = order.argsort(1)
    for part in reversed(group.unbind(-1)):
        at = at.gather(1, part.gather(1, at).argsort(dim=1, stable=True))
    sorted_ = group.gather(1, at[..., None].expand_as(group))
    begins = torch.nn.functional.pad((sorted_[:, 1:] != sorted_[:, :-1]).any(-1), (1, 0), value=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, at, places - places.where(begins, 0).cummax(1).values)
