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
from catp_lightning.utils.on_cpu import on_cpu, on_device


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
        dominant, target, merging = self._parts(scores, visual, counts)
        keep = dominant | target
        itself = torch.arange(keep.shape[1], dtype=torch.int64, device=keep.device).expand_as(keep)
        destination = itself.where(keep, most_similar(vectors, target))
        return Selection(keep, destination.where(keep | (visual & merging), -1))

    def _parts(self, scores: Tensor, visual: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Masks of the dominant tokens, and of the context tokens into which others are merged: bool [R, T] each.

        With them which rows have context tokens: bool [R, 1].
        """
        own, asked = on_cpu(visual, counts)
        context = torch.tensor([self._context(count) for count in asked.tolist()], device="cpu", dtype=torch.int64)
        left = own.sum(1) - (asked - context)
        step = (left // context.clamp(min=1)).clamp(min=1)[:, None]
        # Of the tokens that are not dominant, counted from 1; the last column says whether a row has context tokens.
        place = torch.arange(-1, visual.shape[1] + 1, device="cpu")
        chosen = (place % step == 0) & (place >= 0) & (place < (step * context[:, None])) & (place < left[:, None])
        chosen[:, -1] = (context > 0) & (left > 0)
        chosen, few = on_device(chosen, visual.device), on_device(asked - context, visual.device)
        dominant = ranked(scores, visual) < few[:, None]
        others = visual & ~dominant
        return dominant, others & chosen.gather(1, others.cumsum(1)), chosen[:, -1:]

    def _context(self, count: int) -> int:
        """Number of context tokens in a budget of `count` tokens."""
        return max(0, min(count - 1, math.floor(count * self.context + 0.5)))
