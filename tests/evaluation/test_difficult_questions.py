"""Difficult questions: those that the model answers better than it does from a smaller image."""

import json
from pathlib import Path

import numpy as np
import pytest

from catp_lightning.evaluation.comparison import Comparison, Result
from catp_lightning.evaluation.sweep.difficult import difficult, difficult_page, difficult_tables
from tests.support.sweeps import sweep

IMAGES = [0, 0, 1, 2, 3]


def comparison(measured: bool) -> Comparison:
    """Five questions; from a smaller image the model answers numbers 1 and 3 worse, and number 4 otherwise."""
    full, small = np.array([1.0, 1, 0, 0.6, 0]), np.array([1.0, 0, 0, 0.3, 0])
    same, other = np.array([1.0, 0, 1, 0, 0]), np.array([0.0, 1, 0, 0, 1])
    score = (lambda values: values) if measured else lambda values: None
    return Comparison(
        IMAGES,
        "other",
        [
            Result("no pruning", None, score(full), np.ones(5), 16.0),
            Result("downsample", 0.25, score(small), same, 4.0),
            Result("other", 0.25, score(full), other, 4.0, figures={"pope_f1": 0.5}),
            Result("other", 1, score(full), other, 1.0),
        ],
    )


def test_they_are_those_that_downsampling_answers_worse() -> None:
    own = difficult(comparison(True), 0.25)
    assert own is not None and list(own.images) == [0, 2]
    assert [one.method for one in own.results] == ["no pruning", "downsample", "other"]
    assert [list(one.score) for one in own.results if one.score is not None] == [[1.0, 0.6], [0.0, 0.3], [1.0, 0.6]]
    assert list(own.results[2].same) == [1, 0] and not own.results[2].figures


def test_without_right_answers_they_are_those_that_it_answers_otherwise() -> None:
    own = difficult(comparison(False), 0.25)
    assert own is not None and list(own.images) == [0, 2, 3]
    assert list(own.results[1].same) == [0, 0, 0] and list(own.results[2].same) == [1, 0, 1]


def test_where_nothing_was_downsampled_or_nothing_got_worse_there_are_none() -> None:
    found = comparison(True)
    assert difficult(found, 1) is None
    found.results[1] = Result("downsample", 0.25, found.results[0].score, np.ones(5), 4.0)
    assert difficult(found, 0.25) is None and not difficult_tables("m", found, {})


def test_the_page_has_a_table_for_each_budget_and_shows_names_as_text() -> None:
    tables = difficult_tables("a*b", comparison(True), {"other": False})
    text = difficult_page(tables)
    assert text.startswith("# a\\*b, difficult questions") and "2 questions about 2 images." in text
    assert text.count("## keep") == 1 and "**other** (control)" in text
    (rows,) = (table.to_json()["rows"] for table in tables)
    assert [row["accuracy"] for row in rows] == pytest.approx([0.8, 0.15, 0.8])


@pytest.mark.slow
def test_a_sweep_with_downsampling_writes_them(tmp_path: Path) -> None:
    folder = sweep(tmp_path, "--models", "digits_llava", "--scorers", "downsample,fastervlm", "--keep", "0.05")
    (table,) = json.loads((folder / "digits_llava" / "difficult.json").read_text())
    whole = json.loads((folder / "digits_llava" / "table.json").read_text())
    rows = {row["method"]: row for row in table["rows"]}
    assert rows["downsample"]["accuracy"] < rows["no pruning"]["accuracy"]
    assert int(table["about"].split()[0]) < int(whole["about"].split()[0])
