"""Downsampling, a control: the image at a lower resolution."""

from dataclasses import dataclass
from typing import ClassVar

from catp_lightning.methods.scorers.base import EqualScores


@dataclass(frozen=True)
class Downsample(EqualScores):
    """Control: equal scores for all tokens; its selector, `pool`, keeps the mean of each cell of a coarser grid."""

    selector: ClassVar[str] = "pool"
    control: ClassVar[bool] = True
    published: ClassVar[bool] = False
