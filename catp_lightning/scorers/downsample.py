"""Downsampling: the image at a lower resolution, a control."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from catp_lightning.observation import Needs, Observation
from catp_lightning.scorers.base import Scorer


@dataclass(frozen=True)
class Downsample(Scorer):
    """All tokens are equal: its selector, `pool`, keeps the mean of each cell of a coarser grid."""

    selector: ClassVar[str] = "pool"
    control: ClassVar[bool] = True
    published: ClassVar[bool] = False

    @property
    def needs(self) -> Needs:
        return {}

    def score(self, seen: Observation) -> Tensor:
        return torch.zeros(seen.exists.shape, device=seen.exists.device, dtype=torch.float32)
