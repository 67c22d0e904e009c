"""Keeps the most relevant tokens, and of the others those that are unlike each other (VisPruner, 2412.01818v2)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from catp_lightning.methods.selection import Selection
from catp_lightning.methods.selectors.base import FeatureSelector, ranked
from catp_lightning.methods.selectors.similarity import rounded_similarity

AT_A_TIME = 8
"""Number of tokens that a round drops at most, as in the authors' code."""


@dataclass(frozen=True)
class PruneSimilar(FeatureSelector):
    """Keeps the highest scores for a share of the budget, and for the rest the tokens least similar to each other.

    The other tokens, highest score first, are dealt to two sides in turn. Of the first side the tokens most similar to
    their nearest on the second side (cosine of the tokens as they leave the vision part) are dropped, 8 at a time. The
    rest of the first side, most similar first, and then the second side are dealt again, until the budget is met. Of
    tokens of equal similarity the one that came first stays. A round never drops more than needed, nor more than half
    of the tokens left; in that case, and for an odd number of tokens left, the authors' code fails. It rounds the share
    down as here, but to 0 at a budget of 1. Tokens with NaN in their features are kept only if the budget exceeds the
    number of all others.

    Attributes:
        important: share of the budget that goes to the highest scores, from 0 to 1; at least one token unless it is 0.
    """

    nested: ClassVar[bool] = False

    important: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.important <= 1:
            raise ValueError(f"important is {self.important}; it is a share of the budget, from 0 to 1.")

    def select(self, scores: Tensor, visual: Tensor, counts: Tensor, vectors: Tensor | None) -> Selection:
        assert vectors is not None  # `vectors` above always gives some
        finite = visual & ~vectors.isnan().any(-1)
        last = (~finite).long() + (~visual).long()
        order = (ranked(scores, visual) + last * visual.shape[1]).argsort(1)
        keep = torch.zeros_like(visual)
        sizes = torch.stack([finite.sum(1).maximum(counts), counts], 1)
        for size in sizes.unique(dim=0):  # rows of equal sizes are worked on together
            rows = (sizes == size).all(1).nonzero()[:, 0]
            tokens, count = (int(number) for number in size)
            chosen = self._chosen(order[rows, :tokens], count, vectors[rows])
            keep[rows[:, None], chosen] = True
        return Selection(keep)

    def _chosen(self, order: Tensor, count: int, vectors: Tensor) -> Tensor:
        """Tokens kept in rows of n tokens each: indices int64 [R, n], highest score first -> int64 [R, count]."""
        top = min(count, max(int(count * self.important), int(self.important > 0)))
        important, left = order[:, :top], order[:, top:]
        if top == count:
            return important
        similarity = rounded_similarity(vectors)
        each = torch.arange(len(order), device=order.device)[:, None]
        while left.shape[1] > count - top:
            first, second = left[:, ::2], left[:, 1::2]
            drop = min(AT_A_TIME, left.shape[1] - (count - top), left.shape[1] // 2)
            nearest = similarity[each[..., None], first[..., None], second[:, None]].amax(2)
            stays = nearest.argsort(dim=1, stable=True)[:, : first.shape[1] - drop].flip(1)
            left = torch.cat([first.gather(1, stays), second], 1)
        return torch.cat([important, left], 1)
