"""Base of metrics that are the accuracy of groups of questions with options, and of all of them."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from catp_lightning.data.benchmarks.references import GroupedChoice


class GroupedChoices(Metric):
    """Shares of questions that are answered right, by group, counted in int64.

    A subclass sets `groups`, and implements `judge`.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    groups: ClassVar[tuple[str, ...]]
    asked: Tensor
    answered: Tensor
    right: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("asked", "answered", "right"):
            zeros = torch.zeros(len(self.groups), dtype=torch.int64, device="cpu")
            self.add_state(name, zeros, dist_reduce_fx="sum")

    @abstractmethod
    def judge(self, prediction: str, answer: str) -> bool | None:
        """Return whether a prediction names the right option's letter; None if it names none, and is left out."""

    def score(self, prediction: str, reference: GroupedChoice) -> float:
        """Return 1.0 if one answer is right, else 0.0, also if it names no option."""
        return float(self.judge(prediction, reference.answer) is True)

    def update(self, predictions: Sequence[str], references: Sequence[GroupedChoice]) -> None:
        """Add B predictions, and what each is compared with.

        Raises:
            ValueError: there are not as many references as predictions.
        """
        found = torch.zeros(3, len(self.groups), dtype=torch.int64, device="cpu")
        for prediction, reference in zip(predictions, references, strict=True):
            judged = self.judge(prediction, reference.answer)
            counts = [1, int(judged is not None), int(judged is True)]
            found[:, self.groups.index(reference.group)] += torch.tensor(counts, dtype=torch.int64, device="cpu")
        asked, answered, right = found.to(self.asked.device)
        self.asked, self.answered, self.right = self.asked + asked, self.answered + answered, self.right + right

    def compute(self) -> dict[str, Tensor]:
        """Return the accuracy of each group that was asked, and of all, float32 in [0, 1]; NaN where none answered."""
        shares = self.right.float() / self.answered.float()
        asked = (self.asked > 0).tolist()
        figures = {f"{group}_accuracy": shares[number] for number, group in enumerate(self.groups) if asked[number]}
        return {**figures, "accuracy": self.right.sum().float() / self.answered.sum().float()}
