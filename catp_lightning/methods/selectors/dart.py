"""Keeps a few pivots and the tokens least similar to them (DART, 2502.11494, section 4)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from catp_lightning.methods.observation import Signal
from catp_lightning.methods.selection import Selection
from catp_lightning.methods.selectors.base import FeatureSelector, ranked
from catp_lightning.utils.on_cpu import on_cpu


@dataclass(frozen=True)
class DART(FeatureSelector):
    """Keeps the tokens with the highest scores as pivots, and for each a share of the tokens least similar to it.

    Similarity is the cosine of the rows that enter the layer where tokens are dropped. The budget beyond the pivots is
    shared out evenly among them, the remainder to the pivots with the highest scores. With a budget of `pivots` or
    fewer only pivots are kept. Where similarities are equal the lowest index is taken; a token whose similarity is NaN
    is taken last. The authors' code takes pivots in the order of a set, normalises rows with the model's last norm
    before it compares them, and rounds the shares, so that it keeps about as many tokens as the budget; here exactly as
    many.

    Attributes:
        pivots: number of pivots, at least 1; the authors' code has four visual ones.
    """

    nested: ClassVar[bool] = False  # another budget gives the pivots other shares
    compared: ClassVar[Signal] = Signal.HIDDEN_STATES

    pivots: int = 4

    def __post_init__(self) -> None:
        if self.pivots < 1:
            raise ValueError(f"pivots is {self.pivots}; tokens are compared with at least 1.")

    def select(self, scores: Tensor, visual: Tensor, counts: Tensor, vectors: Tensor | None) -> Selection:
        assert vectors is not None
        order = ranked(scores, visual)
        pivots = counts.clamp(max=min(self.pivots, visual.shape[1]))
        share, more = (counts - pivots) // pivots.clamp(min=1), (counts - pivots) % pivots.clamp(min=1)
        keep = (order < pivots[:, None]) & visual
        directions = torch.nn.functional.normalize(vectors, dim=-1)
        for turn in range(min(self.pivots, int(on_cpu(counts)[0].max()))):
            pivot = directions[torch.arange(len(order), device=order.device), (order == turn).int().argmax(1)]
            likeness = (directions * pivot[:, None]).sum(-1)  # not a product of matrices: equal rows must stay equal
            takes = (share + (turn < more)).where(turn < pivots, 0)
            keep = keep | (ranked(-likeness, visual & ~keep) < takes[:, None])
        return Selection(keep)
