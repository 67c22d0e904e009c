"""Score on OCRBench."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from catp_lightning.data.benchmarks.ocrbench import KINDS
from catp_lightning.data.benchmarks.references import Reading

PARTS = tuple(dict.fromkeys(KINDS.values()))
"""Parts of the score."""


def is_read(answer: str, reference: Reading) -> bool:
    """True if one of a question's texts is in an answer; letter case and line breaks do not count.

    In formulas spaces do not count, and letter case does.

    >>> is_read("It says STOP.", Reading("Regular Text Recognition", ("stop",), False))
    True
    >>> is_read("x_1=2", Reading("Handwritten Mathematical Expression Recognition", ("X_1 = 2",), True))
    False
    """

    def plain(text: str) -> str:
        text = text if reference.formula else text.lower()
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if reference.formula else text

    return any(plain(text) in plain(answer) for text in reference.answers)


class OCRBenchScore(Metric):
    """Number of questions that are answered right (`is_read`), as OCRBench counts its score, of 1,000 in all.

    `compute` returns `score`; `accuracy`, the score over the number of questions; and the part of the score of each
    kind, `text_recognition`, `scene_text_vqa`, `document_vqa`, `key_information` and `formulas`.

    >>> score = OCRBenchScore()
    >>> score.update(["STOP"] * 2, [Reading("Doc-oriented VQA", ("stop", "halt"), False), Reading(
    ...     "Doc-oriented VQA", ("go",), False)])
    >>> score.compute()["score"], score.compute()["document_vqa"]
    (tensor(1.), tensor(1.))
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    right: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.zeros(len(PARTS), dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0, dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")

    def score(self, prediction: str, reference: Reading) -> float:
        """Return 1.0 if one answer is right, else 0.0."""
        return float(is_read(prediction, reference))

    def update(self, predictions: Sequence[str], references: Sequence[Reading]) -> None:
        """Add B answers, and what each should read.

        Raises:
            ValueError: there are not as many references as answers.
        """
        right = [0] * len(PARTS)
        for answer, reference in zip(predictions, references, strict=True):
            right[PARTS.index(KINDS[reference.kind])] += is_read(answer, reference)
        self.right = self.right + torch.tensor(right, dtype=torch.int64, device=self.right.device)
        self.total = self.total + len(predictions)

    def compute(self) -> dict[str, Tensor]:
        """Return the score, the accuracy and the parts of the score, each float32."""
        score = self.right.sum().float()
        parts = dict(zip(PARTS, self.right.float().unbind(), strict=True))
        return {"score": score, "accuracy": score / self.total.float(), **parts}
