"""Base class of the sums that a calibration adds up."""

from torchmetrics import Metric


class Sums(Metric):
    """Base class of calibration sums.

    `compute` before any `update` is legal: a process may have no samples, or all its sums from an earlier run.
    """

    full_state_update = False

    @property
    def update_called(self) -> bool:
        """Always True; otherwise torchmetrics warns when it computes before an update."""
        return True
