"""What holds for the metrics of all data sets: processes, resets and precisions do not change a figure."""

from typing import Any

import pytest
import torch
from torchmetrics import Metric

from catp_lightning.data.benchmarks.references import Box, Choice, GroupedChoice, Judgement, Reading, Rotation
from catp_lightning.metrics.benchmarks import BENCHMARKS

CHOICE = Choice(("sky", "grass", "sea"), "B")
VQA, FORMULA = "Doc-oriented VQA", "Handwritten Mathematical Expression Recognition"
UPDATES: dict[str, tuple[list[str], list[Any]]] = {
    "pope": (["yes", "no", "yes", "No."], ["yes", "yes", "no", "no"]),
    "easyvqa": (["Yes.", "dark red", "Teal", "no"], ["yes", "red", "teal", "yes"]),
    "gqa": (["Yes.", "a dog", "red", "no"], ["yes", "dog", "red", "no"]),
    "scienceqa": (["B", "B. grass", "C", "grass"], [CHOICE] * 4),
    "docvqa": (["ab", "Hello", "hallo", "x"], [["ab"], ["hello", "x"], ["hello"], ["abc"]]),
    "ocrbench": (
        ["It is 7.", "8", "x_1", "y"],
        [
            Reading(VQA, ("7", "9"), False),
            Reading(VQA, ("7",), False),
            Reading(FORMULA, ("x _ 1\n",), True),
            Reading(FORMULA, ("Y",), True),
        ],
    ),
    "mmbench": (
        ["A", "grass", "B", "It is a sea of no colour, A"],
        [
            Rotation(7, 7, 2, ("sky", "grass"), "A"),
            Rotation(1000007, 7, 2, ("grass", "sky"), "B"),
            Rotation(8, 8, 2, ("sky", "sea"), "B"),
            Rotation(1000008, 8, 2, ("sea", "sky"), "A"),
        ],
    ),
    "mme": (
        ["Yes", "yes.", "Yes", "No"],
        [Judgement(number, number // 2, "color", "yes" if number % 2 == 0 else "no") for number in range(4)],
    ),
    "mvbench": (
        ["A) sky", "(b)", "C. sea", "The sky"],
        [
            *(GroupedChoice(task, "A") for task in ("moving_count", "moving_count", "action_count")),
            GroupedChoice("action_count", "C"),
        ],
    ),
    "videomme": (
        ["A", "The answer is B.", "C", "no idea"],
        [GroupedChoice(*pair) for pair in (("short", "A"), ("long", "B"), ("short", "D"), ("long", "A"))],
    ),
    "refcoco": (["(0,0),(8,8)", "(0,0),(8,3)", "[0, 0, 8, 4]", "no box"], [Box(0, 0, 8, 8, 1, 1)] * 4),
    "textvqa": (["Nokia", "2", "x", "y"], [["nokia"] * 10, ["two"] * 2 + ["3"] * 8, ["z"] * 10, ["y"] * 10]),
    "vizwiz": (["Grey.", "2", "x", "y"], [["grey"] * 10, ["2"] * 2 + ["3"] * 8, ["z"] * 10, ["y"] * 10]),
}
VALUES: dict[str, dict[str, float]] = {
    "pope": {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 0.5},
    "easyvqa": {"accuracy": 0.5},
    "gqa": {"accuracy": 0.75},
    "scienceqa": {"accuracy": 0.5},
    "docvqa": {"anls": 0.7},
    "ocrbench": {
        "score": 2,
        "accuracy": 0.5,
        "text_recognition": 0,
        "scene_text_vqa": 0,
        "document_vqa": 1,
        "key_information": 0,
        "formulas": 1,
    },
    "mmbench": {"accuracy": 1.0, "circular_accuracy": 0.5},
    "mme": {"color_accuracy": 0.75, "color_accuracy_plus": 0.5},
    "mvbench": {"moving_count_accuracy": 0.5, "action_count_accuracy": 0.0, "accuracy": 0.25},
    "videomme": {"short_accuracy": 0.5, "long_accuracy": 1.0, "accuracy": 2 / 3, "answered": 0.75},
    "refcoco": {"accuracy": 0.5},
    "textvqa": {"accuracy": 0.65},
    "vizwiz": {"accuracy": 0.65},
}
every_metric = pytest.mark.parametrize("name", BENCHMARKS)


def updated(metric: Metric, name: str, *rows: int) -> Metric:
    predictions, references = UPDATES[name]
    metric.update([predictions[row] for row in rows], [references[row] for row in rows])
    return metric


def figures(metric: Metric) -> dict[str, float]:
    computed = metric.compute()
    assert all(value.dtype == torch.float32 for value in computed.values())
    return {name: value.item() for name, value in computed.items()}


@every_metric
def test_two_processes_count_as_one(name: str) -> None:
    first, second = updated(BENCHMARKS[name](), name, 0, 1, 2), updated(BENCHMARKS[name](), name, 3)
    first.merge_state(second)
    assert figures(first) == pytest.approx(VALUES[name], abs=1e-6)


@every_metric
def test_state_reset_in_inference_mode_counts_outside_it(name: str) -> None:
    metric = BENCHMARKS[name]()
    with torch.inference_mode():
        updated(metric, name, 0, 1)
        metric.reset()
    assert figures(updated(updated(metric, name, 0, 1, 2), name, 3)) == pytest.approx(VALUES[name], abs=1e-6)


@every_metric
def test_counts_stay_exact_under_half_precision(name: str) -> None:
    metric = torch.nn.ModuleList([BENCHMARKS[name]()]).to(torch.bfloat16)[0]
    for _ in range(300):  # bfloat16 counts to 256
        updated(metric, name, 0, 1, 2, 3)
    times = {"ocrbench": 300}.get(name, 1)  # a score that is a number, not a share
    expected = {key: value * (1 if key == "accuracy" else times) for key, value in VALUES[name].items()}
    assert figures(metric) == pytest.approx(expected, abs=1e-6)


@every_metric
def test_as_many_references_as_predictions_are_needed(name: str) -> None:
    with pytest.raises(ValueError, match="shorter"):
        BENCHMARKS[name]().update(UPDATES[name][0], UPDATES[name][1][:1])
