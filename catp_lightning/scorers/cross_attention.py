"""Mean log attention: a softer vote than a rank, and much cheaper."""

from dataclasses import dataclass

from torch import Tensor

from catp_lightning.observation import Needs, Observation, Signal
from catp_lightning.scorers.base import AttentionScorer


@dataclass(frozen=True)
class CrossAttention(AttentionScorer):
    """Each head votes by the mean over image tokens of log attention, standardised over the tokens of the image.

    Ours; the votes that calibration regresses on. A mean of probabilities would say nothing: each row sums to 1.
    """

    @property
    def needs(self) -> Needs:
        return {Signal.CROSS_ATTENTION: self.layers}

    def votes(self, seen: Observation) -> Tensor:
        return standardise(seen.by_layer(Signal.CROSS_ATTENTION, self.layers).clamp(min=1e-20).log().mean(-1))


def standardise(scores: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the last axis; equal scores become 0."""
    centred = scores - scores.mean(-1, keepdim=True)
    return centred / centred.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
