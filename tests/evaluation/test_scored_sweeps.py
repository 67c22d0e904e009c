"""Sweeps score answers by the rule of their data set, count prices and measure seconds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catp_lightning.data.benchmarks import Reader
from catp_lightning.evaluation.comparison import Comparison, Result
from catp_lightning.evaluation.sweep.results import scored
from catp_lightning.metrics.benchmarks import BENCHMARKS
from tests.support.benchmark_files import DATA_SETS
from tests.support.sweeps import outcome, sweep, table


def batches(reader: Reader, size: int) -> list[dict[str, Any]]:
    """Batches of a reader's questions as a datamodule makes them, with as much as scoring reads."""
    records = reader.records()
    parts = [records[first : first + size] for first in range(0, len(records), size)]
    return [{"metric": reader.metric, "references": [record.reference for record in part]} for part in parts]


def right(reference: Any) -> str:
    """An answer that a data set's rule takes for right, or partly right."""
    if hasattr(reference, "left"):
        sides = (reference.left, reference.top, reference.right, reference.bottom)
        units = (reference.x_unit, reference.y_unit) * 2
        return ", ".join(f"{side / unit:.6f}" for side, unit in zip(sides, units, strict=True))
    found = getattr(reference, "answer", None) or getattr(reference, "answers", reference)
    return found if isinstance(found, str) else found[0]


@pytest.mark.parametrize("name", DATA_SETS)
def test_answers_have_the_score_of_their_data_set(name: str, tmp_path: Path) -> None:
    asked = batches(DATA_SETS[name](tmp_path), 2)
    references = [reference for batch in asked for reference in batch["references"]]
    answers = [right(reference) if number else "no" for number, reference in enumerate(references)]
    score, figures = scored(answers, asked)
    assert score is not None and score[0] == 0 < score[1:].min() and score.max() <= 1
    metric: Any = BENCHMARKS[name]()
    metric.update(answers, references)
    official = metric.compute()
    assert figures == {f"{name}_{key}": official[key].item() for key in official if f"{name}_{key}" in figures}
    if name not in ("mmbench", "mme", "docvqa", "videomme"):  # whose means are over other questions, or of another name
        assert score.mean() == pytest.approx(official["accuracy"].item(), abs=1e-6)


def test_the_figures_that_a_data_set_reports_are_beside_the_mean(tmp_path: Path) -> None:
    asked = batches(DATA_SETS["pope"](tmp_path), 6)
    score, figures = scored(["yes"] * 6, asked)
    assert score is not None and score.mean() == 0.5 and figures == {"pope_f1": pytest.approx(2 / 3)}
    parts = {"mmbench", "ocrbench"}
    found = {name: scored(["a CENTRE"] * 4, batches(DATA_SETS[name](tmp_path / name), 3))[1] for name in parts}
    assert found["mmbench"].keys() == {"mmbench_accuracy", "mmbench_circular_accuracy"}
    assert found["ocrbench"] == {"ocrbench_score": 1.0}, "one of four texts"


def test_data_without_right_answers_have_no_score() -> None:
    assert scored(["yes", "no"], [{"question_ids": [1, 2]}]) == (None, {})
    assert scored(["yes", "no"], [{"metric": "pope", "references": ["yes"]}, {"metric": "pope"}]) == (None, {})


def test_a_change_of_accuracy_is_paired_with_the_unpruned_model() -> None:
    score = np.array([1.0, 0.0, 1.0, 1.0])
    full = Result("no pruning", None, score, np.ones(4), 32.0, seconds=2.0)
    worse = Result("stride", 8, score - np.array([0.5, 0, 0.5, 0.5]), np.ones(4), 8.0, figures={"pope_f1": 0.5})
    rows = Comparison(range(4), "stride", [full, worse]).rows()
    assert "accuracy_change" not in rows[0] and rows[0]["seconds"] == 2.0 and rows[1]["figures"] == {"pope_f1": 0.5}
    assert rows[1]["accuracy_change"] == pytest.approx(-0.375)
    low, high = rows[1]["accuracy_change_interval"]
    assert -0.5 <= low < -0.375 < high <= 0, "each question changed by -0.5 or not at all"


def test_rows_have_prices_and_seconds_at_numbers_of_tokens_too(swept: Path) -> None:
    rows = table(swept)
    full, stride, fastv = (rows[key] for key in (("no pruning", "None"), ("stride", "0.5"), ("fastv", "0.5")))
    assert set(full["prices"].values()) == {1.0} and stride["prices"]["tokens"] == 0.5
    assert 0.5 < stride["prices"]["prefill_flops"] < fastv["prices"]["prefill_flops"] < 1
    assert fastv["prices"]["tokens_per_layer"] == (1 + 1 + 0.5 + 0.5) / 4
    for row in rows.values():
        assert row["seconds"] > 0
    assert stride["seconds"] == outcome(swept, "stride-keep-0.5.json")["seconds"]


def test_a_table_says_of_which_data_and_versions_it_is(swept: Path) -> None:
    found = json.loads((swept / "digits_blip2/table.json").read_text())["settings"]
    assert found["versions"].keys() == {"catp-lightning", "torch", "transformers"} and len(found["data"]) == 16


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_jobs_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    args = ["--models", "digits_blip2", "--scorers", "stride", "--keep", "0.25", "--questions", 8]
    file = sweep(tmp_path, *args) / "digits_blip2/jobs/stride-keep-0.25.json"
    saved = json.loads(file.read_text())
    del saved["outcome"]["seconds"], saved["outcome"]["prices"]
    file.write_text(json.dumps(saved))
    before = file.stat().st_mtime_ns
    row = table(sweep(tmp_path, *args))["stride", "0.25"]
    assert file.stat().st_mtime_ns == before and "seconds" not in row and "prices" not in row
