"""Trimmed Llama: attention from text to image in the first cross-attention layer (2504.00557)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.scorers.base import PaidAttention


@dataclass(frozen=True)
class TrimmedLlama(PaidAttention):
    """Attention that an image token gets from the text in a cross-attention layer, summed over text rows and heads.

    Its selector, `union`, keeps the tokens that any head ranks high; with `top-k` the sum over heads decides. The sum
    over text rows is our reading of the paper, which does not say how they are combined.
    """

    fitted: ClassVar[bool] = True
    selector: ClassVar[str] = "union"

    @property
    def needs(self) -> Needs:
        return {Signal.CROSS_ATTENTION_TO_IMAGE: self.layers}

    def attention(self, seen: Observation) -> Tensor:
        return seen.by_layer(Signal.CROSS_ATTENTION_TO_IMAGE, self.layers)
