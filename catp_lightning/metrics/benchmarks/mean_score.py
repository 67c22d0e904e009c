"""Base of metrics that are the mean of a score of each question."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanScore(Metric):
    """Mean over questions of a score from 0 to 1, counted in int64: any number of processes gives the same result.

    A subclass sets `unit` and `figure`, and implements `points`.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    unit: ClassVar[int] = 1
    """Points that are a score of 1."""
    figure: ClassVar[str] = "accuracy"
    """Name of the mean."""
    points_sum: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("points_sum", "total"):
            self.add_state(name, torch.tensor(0, dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")

    @abstractmethod
    def points(self, prediction: str, reference: Any) -> int:
        """Return the score of one prediction, in points from 0 to `unit`."""

    def score(self, prediction: str, reference: Any) -> float:
        """Return the score of one prediction, in [0, 1]."""
        return self.points(prediction, reference) / self.unit

    def update(self, predictions: Sequence[str], references: Sequence[Any]) -> None:
        """Add B predictions, and what each is compared with.

        Raises:
            ValueError: there are not as many references as predictions.
        """
        found = [self.points(*pair) for pair in zip(predictions, references, strict=True)]
        self.points_sum = self.points_sum + sum(found)
        self.total = self.total + len(found)

    def compute(self) -> dict[str, Tensor]:
        """Return the mean, float32 in [0, 1], under the name `figure`."""
        return {self.figure: self.points_sum.float() / (self.unit * self.total).float()}
