"""POPE's scores are those of the authors' script."""

import pytest
import torch

from catp_lightning.metrics.benchmarks import POPEScores

ANSWERS = [
    "yes", "Yes.", "No", "no", "NO", "no,", "No, it is there.", "It is not. Yes", "Nothing", "yes, no", "", "no\n",
    "I do not know", "Cannot say. No", "There is no dog", "yes",
]  # fmt: skip
LABELS = ["yes", "no", "no", "yes", "no", "no", "yes", "no", "no", "yes", "no", "yes", "no", "no", "yes", "yes"]


def as_the_script_counts(answers: list[str], labels: list[str]) -> dict[str, float]:
    """The arithmetic of evaluate.py on 0 and 1: the first sentence, no commas, words between single spaces."""
    said = []
    for answer in answers:
        sentence = answer[: answer.find(".")] if "." in answer else answer
        words = sentence.replace(",", "").split(" ")
        said.append(0 if any(word in words for word in ("No", "not", "no")) else 1)
    truth = [0 if label == "no" else 1 for label in labels]
    pairs = list(zip(said, truth, strict=True))
    tp, fp, tn, fn = (pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 0), (0, 1)))
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    return {
        "accuracy": (tp + tn) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "yes_ratio": said.count(1) / len(said),
    }


def test_scores_are_those_of_the_script() -> None:
    scores = POPEScores()
    for start in range(0, len(ANSWERS), 3):
        scores.update(ANSWERS[start : start + 3], LABELS[start : start + 3])
    expected = as_the_script_counts(ANSWERS, LABELS)
    assert len(set(expected.values())) > 3
    assert {name: value.item() for name, value in scores.compute().items()} == pytest.approx(expected, abs=1e-7)


def test_without_any_yes_scores_are_zero_not_undefined() -> None:
    scores = POPEScores()
    scores.update(["no", "no"], ["no", "no"])
    assert {name: value.item() for name, value in scores.compute().items()} == {
        "accuracy": 1.0, "precision": 0.0, "recall": 0.0, "f1": 0.0, "yes_ratio": 0.0,
    }  # fmt: skip


def test_as_many_labels_as_answers_are_needed() -> None:
    with pytest.raises(ValueError, match="longer"):
        POPEScores().update(["yes"], ["yes", "no"])
    assert POPEScores().counts.dtype == torch.int64
