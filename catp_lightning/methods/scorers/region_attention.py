"""Cross-attention to the regions of an image that the vision tower itself attends to."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.scorers.base import AttentionScorer
from catp_lightning.methods.scorers.cross_attention import standardise


@dataclass(frozen=True)
class RegionAttention(AttentionScorer):
    """Log cross-attention of a query token, weighted by the attention that image tokens receive in the vision tower.

    Our own method. A head's score of query token q is log sum_n w[n] A[q, n], standardised over the query tokens
    of the image; A is its attention, and w[n] the attention that image token n receives in the vision tower's last
    block, summed over heads and rows (the image weight of 2404.08567's code) and scaled to sum to 1. A query token that
    attends to the background scores low, however it ranks there.
    """

    fitted: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        return {Signal.CROSS_ATTENTION: self.layers, Signal.VISION_ATTENTION_RECEIVED: None}

    def head_scores(self, seen: Observation) -> Tensor:
        maps = seen.by_layer(Signal.CROSS_ATTENTION, self.layers)
        weight = seen[Signal.VISION_ATTENTION_RECEIVED].to(maps.dtype)
        on_regions = torch.einsum("ilhqn,in->ilhq", maps, weight / weight.sum(-1, keepdim=True))
        return standardise(on_regions.clamp(min=1e-20).log())
