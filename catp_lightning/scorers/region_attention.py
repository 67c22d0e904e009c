"""Attention on the regions of an image that the vision tower itself attends to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from catp_lightning.observation import Needs, Observation, Signal
from catp_lightning.scorers.base import AttentionScorer
from catp_lightning.scorers.cross_attention import standardise


@dataclass(frozen=True)
class RegionAttention(AttentionScorer):
    """Each head votes by the log of the attention a token pays image tokens, weighted by what those receive.

    Ours. log sum_n w[n] A[q, n], standardised over the tokens of the image; w[n] is the attention that image token n
    receives in the vision tower's last block, summed over heads and rows (the image weight of 2404.08567's code). A
    token that looks at background scores low, whatever its rank there.
    """

    @property
    def needs(self) -> Needs:
        return {Signal.CROSS_ATTENTION: self.layers, Signal.VISION_ATTENTION_RECEIVED: None}

    def votes(self, seen: Observation) -> Tensor:
        maps = seen.by_layer(Signal.CROSS_ATTENTION, self.layers)
        weight = seen[Signal.VISION_ATTENTION_RECEIVED].to(maps.dtype)
        on_regions = torch.einsum("ilhqn,in->ilhq", maps, weight / weight.sum(-1, keepdim=True))
        return standardise(on_regions.clamp(min=1e-20).log())
