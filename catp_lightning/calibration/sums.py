"""Base class of the sums that a calibration adds up."""

from collections.abc import Mapping

import torch
from torch import Tensor
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


def copied(metrics: Mapping[str, Metric]) -> dict[str, Tensor]:
    """Return copies of the metrics' current states in CPU memory; lists are concatenated, empty lists left out."""
    return {
        name: (torch.cat(value) if isinstance(value, list) else value).detach().to("cpu", copy=True).contiguous()
        for name, value in states(metrics).items()
        if not isinstance(value, list) or value
    }


def bytes_of(metrics: Mapping[str, Metric]) -> int:
    """Return the bytes of the metrics' current states."""
    values = states(metrics).values()
    return sum(one.nbytes for value in values for one in (value if isinstance(value, list) else [value]))


def states(metrics: Mapping[str, Metric]) -> dict[str, Tensor | list[Tensor]]:
    """Return the states of several metrics, by the metric's name and their own: "metric/state"."""
    return {
        f"{name}/{state}": value for name, metric in metrics.items() for state, value in metric.metric_state.items()
    }
