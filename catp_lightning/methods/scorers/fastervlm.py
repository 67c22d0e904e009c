"""FasterVLM: attention of [CLS] in the vision tower (2412.01818v1, section 3)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.scorers.base import PaidAttention


@dataclass(frozen=True)
class FasterVLM(PaidAttention):
    """Attention from [CLS] to the patch, summed over heads, in the layer whose output the language model reads.

    In a vision tower without [CLS] (SigLIP) the score is the attention that a patch receives on average, which is not
    in the paper. `layers` counts only the layers of the tower that lead to the features: -1 is the last of them.
    """

    fitted: ClassVar[bool] = True

    layers: tuple[int, ...] | None = (-1,)

    @property
    def needs(self) -> Needs:
        return {Signal.VISION_ATTENTION: self.layers}

    def attention(self, seen: Observation) -> Tensor:
        return seen.by_layer(Signal.VISION_ATTENTION, self.layers)
