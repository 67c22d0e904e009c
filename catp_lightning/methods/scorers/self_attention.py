"""Self-attention received by a token, the method named SpAtten in CATP's tables (2404.08567, section 4)."""

from dataclasses import dataclass

from torch import Tensor

from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.scorers.base import AttentionScorer


@dataclass(frozen=True)
class SelfAttention(AttentionScorer):
    """Attention that a token receives from the other visual tokens, summed over all layers, heads and query rows."""

    @property
    def needs(self) -> Needs:
        return {Signal.SELF_ATTENTION: self.layers}

    def head_scores(self, seen: Observation) -> Tensor:
        return seen.by_layer(Signal.SELF_ATTENTION, self.layers)
