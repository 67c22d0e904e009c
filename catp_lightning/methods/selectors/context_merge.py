"""Keeps the most relevant tokens and merges all others into a few (VisionZip, 2412.04467, section 3)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.selection import Selection
from catp_lightning.methods.selectors.base import Selector, ranked
from catp_lightning.methods.selectors.similarity import most_similar
from catp_lightning.utils.on_cpu import on_cpu, on_device_of


@dataclass(frozen=True)
class ContextMerge(Selector):
    """Keeps dominant tokens, those with the highest scores, and merges the others into a few context tokens.

    Context tokens are evenly spaced among the tokens that are not dominant; each of the others is merged into the
    context token most similar to it, the first if several are. Similarity is the cosine of the keys in the last layer
    of the vision tower that leads to the features, averaged over heads. A context token becomes the mean of all that
    are merged into it, itself included; the authors' code adds the mean of the others to it. The number of context
    tokens is rounded to the nearest, and at least one token is dominant.

    Attributes:
        context: share of the budget that goes to context tokens, from 0 to 1; the authors take 10 of 64.
    """

    nested: ClassVar[bool] = False
    merges: ClassVar[bool] = True
    compares: ClassVar[bool] = True

    context: float = 10 / 64

    def __post_init__(self) -> None:
        if not 0 <= self.context <= 1:
            raise ValueError(f"context is {self.context}; it is a share of the budget, from 0 to 1.")

    @property
    def needs(self) -> Needs:
        return {Signal.VISION_KEYS: (-1,)}

    def vectors(self, seen: Observation) -> Tensor:
        return seen.by_layer(Signal.VISION_KEYS, (-1,))[:, 0].transpose(1, 2)

    def select(self, scores: Tensor, visual: Tensor, counts: Tensor, vectors: Tensor | None) -> Selection:
        assert vectors is not None  # `vectors` above always gives some
        dominant, target = self._parts(scores, visual, counts)
        keep = dominant | target
        nearest = most_similar(vectors, target)
        itself = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
        lost = ~visual | ~(keep | target.any(1, keepdim=True))
        return Selection(keep, torch.where(keep, itself, nearest).masked_fill(lost, -1))

    def _parts(self, scores: Tensor, visual: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Masks of the dominant tokens, and of the context tokens into which others are merged: bool [R, T] each."""
        context = on_device_of(counts, [self._context(count) for count in on_cpu(counts)[0].tolist()])
        dominant = (ranked(scores, visual) < (counts - context)[:, None]) & visual
        left = visual & ~dominant
        step = (left.sum(1) // context.clamp(min=1)).clamp(min=1)[:, None]
        place = left.cumsum(1) - 1
        return dominant, left & (place % step == 0) & (place < step * context[:, None])

    def _context(self, count: int) -> int:
        """Number of context tokens in a budget of `count` tokens."""
        return min(count - 1, math.floor(count * self.context + 0.5))
