"""Passes of a calibration: each reads the split once and adds up its findings in metrics."""

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor
from torchmetrics import Metric

from catp_lightning.calibration.replay.samples import Samples

Belongs = Callable[[Tensor], Tensor]
"""Function that selects the samples of a stage by the fingerprint of their image: int64 [B] -> bool [B]."""


class Stage(Protocol):
    """Protocol of a stage, which adds up metrics during one reading of the split."""

    title: str

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """Metrics of the stage, by name."""

    def see(self, samples: Samples) -> None:
        """Add a batch to the metrics."""
