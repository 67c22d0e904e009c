"""MVBench and Video-MME: the arithmetic of their authors' scorers, written out step by step, on many answers."""

import re
from itertools import product

import numpy as np
import pytest

from catp_lightning.data.benchmarks.mvbench import TASKS
from catp_lightning.data.benchmarks.references import GroupedChoice
from catp_lightning.data.benchmarks.videomme import DURATIONS
from catp_lightning.metrics.benchmarks import MVBenchAccuracy, VideoMMEAccuracy
from catp_lightning.metrics.benchmarks.mvbench import names_option
from catp_lightning.metrics.benchmarks.videomme import first_letter

ANSWERS = [
    *("A", "b", "(C)", "(d", "D)", "B.", "(A).", "A) sky", "(B) Grass", "B: grass", "AB", "(a)(b)", "( C )", "C. sea"),
    *("the best option is A", "The best answer is C.", "The answer is D", "The answer", "Best answer: C"),
    *("The best option is B", "The correct answer is\nA", "A\nB", "\n(C) sea\nD", "dog", "I know nothing of it"),
    *("Best option: D", "1", "é A"),
    *("I think that this is a very long answer without any of the letters", "It is a cat, so B it is", "D" * 12, "."),
    *("", " ", "(", ")", "...", "()", "(."),
]  # fmt: skip


def check_ans(message: str, answer: str) -> bool:
    """As MVBench's notebook reads a message of the model, to which "Best option:(" was written in advance."""
    said = "(" + message.strip().split("\n")[0]
    pred_option = said.lower().split(" ")[0]
    gt_option = answer.lower().split(" ")[0]
    flag = False
    if pred_option.replace(".", "") in gt_option or gt_option in pred_option:
        flag = True
    return flag


def test_mvbench_reads_every_answer_as_its_authors_do_but_for_those_without_a_word() -> None:
    differing = set()
    for answer, letter in product(ANSWERS, "ABCDE"):
        if names_option(answer, letter) != check_ans(answer, f"({letter}) Some words."):
            assert not names_option(answer, letter), "the authors' comparison holds nothing for right"
            differing.add(answer)
    assert differing == {"", " ", ".", "..."}
    assert any(names_option(answer, "B") for answer in ANSWERS)


def extract_characters_regex(s: str) -> str:
    """As Video-MME's script does it."""
    s = s.strip()
    prefixes = ["The best answer is", "The correct answer is", "The answer is", "The answer"]
    prefixes += ["The best option is" + "The correct option is", "Best answer:" + "Best option:"]  # commas are missing
    for prefix in prefixes:
        s = s.replace(prefix, "")
    if len(s.split()) > 10 and not re.search("[ABCD]", s):
        return ""
    matches = re.search(r"[ABCD]", s)
    return "" if matches is None else matches[0]


def test_videomme_reads_every_answer_as_its_authors_do() -> None:
    assert [first_letter(answer) or "" for answer in ANSWERS] == [extract_characters_regex(a) for a in ANSWERS]
    assert {first_letter(answer) for answer in ANSWERS} == {"A", "B", "C", "D", None}


def test_figures_of_mvbench_are_those_of_the_authors_loop() -> None:
    rng = np.random.default_rng(0)
    words = [answer for answer in ANSWERS if answer.strip(" .")]
    asked = [(TASKS[rng.integers(20)], words[rng.integers(len(words))], "ABCD"[rng.integers(4)]) for _ in range(2000)]
    acc_dict: dict[str, list[int]] = {}
    correct = total = 0
    for task, answer, letter in asked:
        acc_dict.setdefault(task, [0, 0])
        acc_dict[task][1] += 1
        total += 1
        if check_ans(answer, f"({letter}) Words"):
            acc_dict[task][0] += 1
            correct += 1
    expected = {f"{task}_accuracy": right / number for task, (right, number) in acc_dict.items()}
    metric = MVBenchAccuracy()
    for start in range(0, 2000, 7):
        part = asked[start : start + 7]
        metric.update([answer for _, answer, _ in part], [GroupedChoice(task, letter) for task, _, letter in part])
    figures = {name: value.item() for name, value in metric.compute().items()}
    assert figures == pytest.approx({**expected, "accuracy": correct / total}, abs=1e-6)
    assert len(figures) == 21


def test_figures_of_videomme_are_those_of_the_authors_loop() -> None:
    rng = np.random.default_rng(1)
    asked = [
        (DURATIONS[rng.integers(3)], ANSWERS[rng.integers(len(ANSWERS))], "ABCD"[rng.integers(4)]) for _ in range(900)
    ]
    counts = {duration: {"correct": 0, "answered": 0} for duration in DURATIONS}
    for duration, answer, letter in asked:
        extraction = extract_characters_regex(answer)
        if extraction != "":
            counts[duration]["answered"] += 1
            counts[duration]["correct"] += extraction == letter
    answered = sum(count["answered"] for count in counts.values())
    expected = {f"{duration}_accuracy": count["correct"] / count["answered"] for duration, count in counts.items()}
    expected["accuracy"] = sum(count["correct"] for count in counts.values()) / answered
    expected["answered"] = answered / 900
    metric = VideoMMEAccuracy()
    metric.update(
        [answer for _, answer, _ in asked], [GroupedChoice(duration, letter) for duration, _, letter in asked]
    )
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(expected, abs=1e-6)
    assert 0.5 < expected["answered"] < 1
