"""Scores on POPE."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


def says_yes(answer: str) -> bool:
    """True if POPE's `evaluate.py` reads an answer as yes: its first sentence has no word "No", "no" or "not".

    Commas are removed first; other marks are part of a word, and so are other letter cases ("NO" is not a no).

    >>> says_yes("Yes, it is not."), says_yes("There is a dog. No cat."), says_yes("No, there is none")
    (False, True, False)
    """
    words = answer.split(".", 1)[0].replace(",", "").split(" ")
    return not {"No", "no", "not"}.intersection(words)


class POPEScores(Metric):
    """Accuracy, precision, recall, F1 and the share of answers that are yes, in [0, 1], as POPE's `evaluate.py` does.

    "Yes" is the positive class. A precision, recall or F1 without any case to count, which that script cannot compute,
    is 0.

    >>> scores = POPEScores()
    >>> scores.update(["Yes", "No.", "Yes, a dog.", "no"], ["yes", "no", "no", "yes"])
    >>> scores.compute()["f1"], scores.compute()["yes_ratio"]
    (tensor(0.5000), tensor(0.5000))
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(4, dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")

    def score(self, prediction: str, reference: str) -> float:
        """Return 1.0 if one answer is right, else 0.0."""
        return float(says_yes(prediction) == (reference == "yes"))

    def update(self, predictions: Sequence[str], references: Sequence[str]) -> None:
        """Add B answers, and B labels "yes" or "no".

        Raises:
            ValueError: there are not as many labels as answers.
        """
        counts = [0, 0, 0, 0]  # said no and it is no, said no and it is yes, said yes and it is no, both yes
        for answer, label in zip(predictions, references, strict=True):
            counts[2 * says_yes(answer) + (label == "yes")] += 1
        self.counts = self.counts + torch.tensor(counts, dtype=torch.int64, device=self.counts.device)

    def compute(self) -> dict[str, Tensor]:
        """Return `accuracy`, `precision`, `recall`, `f1` and `yes_ratio`, each float32."""
        right_no, wrong_no, wrong_yes, right_yes = self.counts.float().unbind()
        total = self.counts.sum().float()
        return {
            "accuracy": (right_yes + right_no) / total,
            "precision": right_yes / (right_yes + wrong_yes).clamp_min(1),
            "recall": right_yes / (right_yes + wrong_no).clamp_min(1),
            "f1": 2 * right_yes / (2 * right_yes + wrong_yes + wrong_no).clamp_min(1),
            "yes_ratio": (right_yes + wrong_yes) / total,
        }
