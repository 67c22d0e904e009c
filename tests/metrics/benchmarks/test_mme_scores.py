"""MME's scores are those of the authors' script."""

import random

import pytest

from catp_lightning.data.benchmarks.mme import COGNITION, PERCEPTION, SUBTASKS
from catp_lightning.data.benchmarks.references import Judgement
from catp_lightning.metrics.benchmarks import MMEScores

ANSWERS = ["Yes", "No", "yes, it is", "No.", " no", "Not sure", "I know", "Unknown", "", "It is yes", "NOPE", "eyes"]


def as_the_script_scores(rows: list[tuple[str, Judgement]]) -> dict[str, float]:
    """The arithmetic of calculation.py: per subtask on chunks of two lines, labels by the first four characters."""
    figures: dict[str, float] = {}
    for subtask in SUBTASKS:
        lines = [(answer, of.answer) for answer, of in rows if of.subtask == subtask]
        hits, whole = 0, 0
        for start in range(0, len(lines), 2):
            right = 0
            for answer, truth in lines[start : start + 2]:
                text = answer.lower()
                label = text if text in ("yes", "no") else None
                if label is None:
                    label = "yes" if "yes" in text[:4] else "no" if "no" in text[:4] else "other"
                right += label == truth
            hits += right
            whole += right == 2
        figures[f"{subtask}_accuracy"] = hits / len(lines)
        figures[f"{subtask}_accuracy_plus"] = whole / (len(lines) // 2)
    for name, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        parts = [figures[f"{subtask}_{kind}"] for subtask in subtasks for kind in ("accuracy", "accuracy_plus")]
        figures[name] = 100 * sum(parts)
    return figures


def drawn_rows(images: int) -> list[tuple[str, Judgement]]:
    draw, rows = random.Random(0), []
    for image in range(images * len(SUBTASKS)):
        subtask = SUBTASKS[image // images]
        for number, answer in enumerate(("yes", "no")):
            said = draw.choice([answer.title(), *ANSWERS]) if draw.random() < 0.6 else answer
            rows.append((said, Judgement(2 * image + number, image, subtask, answer)))
    return rows


def test_scores_are_those_of_the_script_in_any_order_of_the_questions() -> None:
    rows = drawn_rows(images=5)
    expected = as_the_script_scores(rows)
    assert 400 < expected["perception"] < 1900 and len({*expected.values()}) > 8
    shuffled = random.Random(1).sample(rows, len(rows))
    metric = MMEScores()
    for start in range(0, len(shuffled), 3):
        batch = shuffled[start : start + 3]
        metric.update([answer for answer, _ in batch], [of for _, of in batch])
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(expected, rel=1e-6)


def test_sums_are_there_where_all_of_their_subtasks_are() -> None:
    metric = MMEScores()
    some = [(answer, of) for answer, of in drawn_rows(images=1) if of.subtask in COGNITION]
    metric.update([answer for answer, _ in some], [of for _, of in some])
    found = metric.compute()
    assert "cognition" in found and "perception" not in found and len(found) == 9


def test_an_image_with_one_question_answered_leaves_accuracy_plus_alone() -> None:
    metric = MMEScores()
    asked = [Judgement(0, 0, "count", "yes"), Judgement(1, 0, "count", "no"), Judgement(2, 1, "count", "yes")]
    metric.update(["yes", "no", "no"], asked)
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found == pytest.approx({"count_accuracy": 2 / 3, "count_accuracy_plus": 1.0})
