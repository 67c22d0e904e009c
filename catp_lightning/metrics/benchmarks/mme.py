"""Scores on MME."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from catp_lightning.data.benchmarks.mme import COGNITION, PERCEPTION, SUBTASKS
from catp_lightning.data.benchmarks.references import Judgement


def said(answer: str) -> str:
    """Return "yes", "no" or "other", as MME's `calculation.py` reads an answer: by its first four characters.

    >>> said("Yes, it is"), said(" No."), said("I know"), said("It is no dog")
    ('yes', 'no', 'other', 'other')
    """
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


class MMEScores(Metric):
    """Accuracy and accuracy+ of each subtask, and the scores of perception and cognition, as MME's `calculation.py`.

    `<subtask>_accuracy` is the share of questions that are answered right, and `<subtask>_accuracy_plus` that of images
    with both questions right; images of which only one question was answered are left out of it. The score of a subtask
    is 100 times the sum of the two, up to 200. `perception` (up to 2,000) and `cognition` (up to 800) are sums of
    scores, and are there where all of their subtasks are.

    >>> scores = MMEScores()
    >>> asked = [Judgement(0, 0, "OCR", "yes"), Judgement(1, 0, "OCR", "no")]
    >>> scores.update(["Yes", "Yes"], asked)
    >>> scores.compute()
    {'OCR_accuracy': tensor(0.5000), 'OCR_accuracy_plus': tensor(0.)}
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    rows: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, predictions: Sequence[str], references: Sequence[Judgement]) -> None:
        """Add B answers and their questions. A question that is added again counts once.

        Raises:
            ValueError: there are not as many references as answers.
        """
        rows = [
            (of.question_id, of.image, SUBTASKS.index(of.subtask), said(answer) == of.answer)
            for answer, of in zip(predictions, references, strict=True)
        ]
        self.rows.append(torch.tensor(rows, dtype=torch.int64, device=self.device))

    def compute(self) -> dict[str, Tensor]:
        """Return the figures of the subtasks that were asked, and the sums; each float32, NaN of no image."""
        found = {row[0]: row[1:] for row in reversed(dim_zero_cat(self.rows).tolist())}
        figures: dict[str, Tensor] = {}
        for number, subtask in enumerate(SUBTASKS):
            images: dict[int, list[int]] = {}
            for image, of, right in found.values():
                if of == number:
                    images.setdefault(image, []).append(right)
            if images:
                pairs = [all(rights) for rights in images.values() if len(rights) == 2]
                figures[f"{subtask}_accuracy"] = self._mean([right for rights in images.values() for right in rights])
                figures[f"{subtask}_accuracy_plus"] = self._mean(pairs)
        for name, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
            if all(f"{subtask}_accuracy" in figures for subtask in subtasks):
                both = [figures[f"{subtask}_{kind}"] for subtask in subtasks for kind in ("accuracy", "accuracy_plus")]
                figures[name] = 100 * torch.stack(both).sum()
        return figures

    def _mean(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device).mean()
