"""Passes of a calibration: each reads the split once and adds up its findings in metrics."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor
from torchmetrics import Metric

from catp_lightning.calibration.replay.samples import Samples

Belongs = Callable[[Samples], Tensor]
"""Function that says which samples a pass reads: B samples -> bool [B]."""


class Pass(ABC):
    """One reading of the split.

    Attributes:
        title: what is measured, shown to the user.
        key: text of all that the sums depend on beside the data; an interrupted pass goes on only under an equal one.
        metrics: the sums, by name.
    """

    title: str
    key: str
    metrics: dict[str, Metric]

    @abstractmethod
    def see(self, samples: Samples, copies: Sequence[Samples] = ()) -> None:
        """Add a batch to the metrics.

        Args:
            samples: B samples.
            copies: the same samples on perturbed images, B for each perturbation of the plan, in its order.
        """
