"""DivPrune: diversity alone (2503.02175)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from catp_lightning.observation import Needs, Observation, Signal
from catp_lightning.scorers.base import Scorer


@dataclass(frozen=True)
class DivPrune(Scorer):
    """All tokens are equal: its selector, `max-min`, keeps those that lie far from each other (section 3, MMDP).

    A published rule, and a control too: it looks at no attention and no question.
    """

    selector: ClassVar[str] = "max-min"
    control: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        return {Signal.OUTPUTS: None}

    def score(self, seen: Observation) -> Tensor:
        return torch.zeros(seen.exists.shape, device=seen.exists.device, dtype=torch.float32)
