"""Prices under shifts: test sets share one split, and their answers are told apart by question."""

import json
from pathlib import Path

import pytest

from benchmarks.shift_prices import SETS, UNIT, outcomes, rows, written
from catp_lightning.utils.files import write_json

FULL = {10**8 * number + image * 100 + at: "yes" for number in range(len(SETS)) for image in range(40) for at in (0, 1)}


def test_a_split_holds_every_set_and_its_questions_say_which(tmp_path: Path) -> None:
    config = json.loads(written(tmp_path, "digits_blip2", 4).read_text())
    test = config["data"]["test"]
    questions = json.loads(Path(test["questions"]).read_text())["questions"]
    sets = [question["question_id"] // 10**8 % 1000 for question in questions]
    assert sets == [number for number in range(len(SETS)) for _ in range(4)]
    assert len(json.loads(Path(test["annotations"]).read_text())["annotations"]) == len(questions)
    turns = questions[-1]["question"]  # of the last set
    assert list(SETS)[-1] == "several-turns" and turns.count("?") == 2
    assert all((Path(test["images"]) / f"{question['image_id']:012d}.png").exists() for question in questions)


def test_jobs_are_sorted_by_what_they_paid(tmp_path: Path) -> None:
    jobs = {"unpruned": 1.0, "fastv-keep-0.03": 0.251, "random-seed-0-keep-0.12": 0.12, "random-seed-1-keep-0.12": 0.12}
    jobs["calibrated-draw-1-at-0-25-of-tokens-per-layer-keep-0.25"] = 0.25
    for name, paid in jobs.items():
        outcome = {"question_ids": [1, 2], "answers": ["a", name], "prices": {UNIT: paid}}
        write_json(tmp_path / "priced-jobs" / f"{name}.json", {"outcome": outcome})
    full, found = outcomes(tmp_path, [0.25, 0.125])
    assert full == {1: "a", 2: "unpruned"}
    assert {name: len(draws) for name, draws in found[0.25].items()} == {"calibrated": 1, "fastv": 1}
    assert {name: len(draws) for name, draws in found[0.125].items()} == {"random": 2}


def test_a_set_in_which_a_method_fails_is_its_own_column() -> None:
    moved = list(SETS).index("moved")
    wrong = {question: "no" if question // 10**8 == moved else "yes" for question in FULL}
    half = {question: "no" if question // 10**8 == moved and question % 100 else "yes" for question in FULL}
    table = {name: cells for name, *cells in rows(FULL, {"a": [FULL], "b": [FULL, wrong], "c": [half]}, "a")}
    assert table["a"] == ["1.000 (1.000 to 1.000)"] * len(SETS)
    assert table["b"][moved] == table["c"][moved] == "0.500 (0.500 to 0.500) ahead"
    assert [cell for at, cell in enumerate(table["b"]) if at != moved] == ["1.000 (1.000 to 1.000) level"] * 6


@pytest.mark.slow
def test_the_whole_on_a_few_questions(tmp_path: Path) -> None:
    from benchmarks.shift_prices import main

    asked = ["--models", "digits_blip2", "--scorers", "divprune", "random", "--reference", "divprune"]
    main([*asked, "--questions", "8", "--shares", "0.25", "--output", str(tmp_path)])
    assert "| divprune |" in (tmp_path / "shift_prices.md").read_text()
