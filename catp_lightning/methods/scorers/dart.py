"""DART: inside the decoder, keep the visual tokens least like a few pivots (2502.11494, section 4)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.scorers.base import Scorer


@dataclass(frozen=True)
class DART(Scorer):
    """L1 norm of the token's row as it enters `layer`; the selector `dart` takes the highest norms as pivots.

    The budget counts all visual tokens of a sample together. The authors' code takes the norm of the keys of the layer
    before and has four more pivots in the text; here all pivots are visual tokens.

    Attributes:
        layer: the decoder layer at whose entry tokens are dropped, from 1.
    """

    selector = "dart"

    layer: int = 2

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise ValueError(f"layer is {self.layer}; tokens leave inside the decoder, so it is at least 1.")

    @property
    def needs(self) -> Needs:
        return {Signal.HIDDEN_STATES: None}

    def stages(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)

    def score(self, seen: Observation) -> Tensor:
        hidden = seen[Signal.HIDDEN_STATES]
        return hidden.to(torch.promote_types(hidden.dtype, torch.float32)).abs().sum(-1)
