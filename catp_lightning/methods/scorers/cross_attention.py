"""Mean log cross-attention: softer than CATP's ranks, and much cheaper."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.scorers.base import AttentionScorer


@dataclass(frozen=True)
class CrossAttention(AttentionScorer):
    """Mean log attention of a query token over image tokens, head by head, standardised over the query tokens.

    Our own method; calibration regresses on these scores. A mean of probabilities would be the same for every query
    token, as each row of attention sums to 1.
    """

    fitted: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        return {Signal.CROSS_ATTENTION: self.layers}

    def head_scores(self, seen: Observation) -> Tensor:
        return standardise(seen.by_layer(Signal.CROSS_ATTENTION, self.layers).clamp(min=1e-20).log().mean(-1))


def standardise(scores: Tensor) -> Tensor:
    """Scale scores to mean 0 and standard deviation 1 over the last axis; equal scores become 0."""
    centred = scores - scores.mean(-1, keepdim=True)
    return centred / centred.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
