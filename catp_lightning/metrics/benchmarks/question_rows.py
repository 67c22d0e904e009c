"""Base of metrics whose questions are judged together, in whatever batches and processes they were answered."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class QuestionRows(Metric):
    """Metric that keeps a row of whole numbers for each question, the first of which is the question's id.

    The last is 1 if the answer is right, else 0. A subclass implements `row`, and computes its figures from `found`.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    rows: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", [], dist_reduce_fx="cat")

    @abstractmethod
    def row(self, answer: str, of: Any) -> tuple[int, ...]:
        """Return the row of a question, given the answer and what it is compared with; 1 at its end if it is right."""

    def score(self, prediction: str, reference: Any) -> float:
        """Return 1.0 if one answer is right, else 0.0."""
        return float(self.row(prediction, reference)[-1])

    def update(self, predictions: Sequence[str], references: Sequence[Any]) -> None:
        """Add B answers and their questions. A question that is added again counts once.

        Raises:
            ValueError: there are not as many references as answers.
        """
        rows = [self.row(*pair) for pair in zip(predictions, references, strict=True)]
        self.rows.append(torch.tensor(rows, dtype=torch.int64, device=self.device))

    def found(self) -> dict[int, list[int]]:
        """Return the rows by question, without the id; of a question that was added again the first."""
        return {row[0]: row[1:] for row in reversed(dim_zero_cat(self.rows).tolist())}

    def mean(self, values: Sequence[int]) -> Tensor:
        """Return the mean of whole numbers, float32; NaN of none."""
        return torch.tensor(values, dtype=torch.float32, device=self.device).mean()
