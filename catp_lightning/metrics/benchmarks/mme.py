"""Scores on MME."""

import torch
from torch import Tensor

from catp_lightning.data.benchmarks.mme import COGNITION, PERCEPTION, SUBTASKS
from catp_lightning.data.benchmarks.references import Judgement
from catp_lightning.metrics.benchmarks.question_rows import QuestionRows


def said(answer: str) -> str:
    """Return "yes", "no" or "other", as MME's `calculation.py` reads an answer: by its first four characters.

    >>> said("Yes, it is"), said(" No."), said("I know"), said("It is no dog")
    ('yes', 'no', 'other', 'other')
    """
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


class MMEScores(QuestionRows):
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

    def row(self, answer: str, of: Judgement) -> tuple[int, ...]:
        return of.question_id, of.image, SUBTASKS.index(of.subtask), int(said(answer) == of.answer)

    def compute(self) -> dict[str, Tensor]:
        """Return the figures of the subtasks that were asked, and the sums; each float32, NaN of no image."""
        found = self.found()
        figures: dict[str, Tensor] = {}
        for number, subtask in enumerate(SUBTASKS):
            images: dict[int, list[int]] = {}
            for image, of, right in found.values():
                if of == number:
                    images.setdefault(image, []).append(right)
            if images:
                pairs = [all(rights) for rights in images.values() if len(rights) == 2]
                figures[f"{subtask}_accuracy"] = self.mean([right for rights in images.values() for right in rights])
                figures[f"{subtask}_accuracy_plus"] = self.mean(pairs)
        for name, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
            if all(f"{subtask}_accuracy" in figures for subtask in subtasks):
                both = [figures[f"{subtask}_{kind}"] for subtask in subtasks for kind in ("accuracy", "accuracy_plus")]
                figures[name] = 100 * torch.stack(both).sum()
        return figures
