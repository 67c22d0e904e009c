"""Compressors in a sweep at equal prices: trained on the calibration split, once for each price, and reused."""

import json
from pathlib import Path

import pytest

from catp_lightning.evaluation.sweep import training
from catp_lightning.policy import PruningPolicy
from tests.support.sweeps import sweep

pytestmark = pytest.mark.slow
MODEL = "digits_blip2"
BUDGET = {"tokens_per_layer": [0.5, 0.25], "prefill_flops": [0.75]}
ARGS = ["--models", MODEL, "--scorers", "quecc,dyvte,stride", "--budget", json.dumps(BUDGET)]
ARGS += ["--questions", "16", "--calibration_questions", "32", "--calibration_draws", "1"]


def test_compressors_are_trained_for_each_price_and_stand_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "EPOCHS", 1)
    output = sweep(tmp_path, *ARGS)
    found = json.loads((output / MODEL / "prices.json").read_text())
    rows = {(row["method"], *next(iter(row["budget"].items()))): row for row in found["rows"] if "budget" in row}
    assert rows["quecc", "tokens_per_layer", 0.5]["prices"]["tokens_per_layer"] == 0.5, "16 of 32 tokens"
    assert 0 < rows["dyvte", "tokens_per_layer", 0.5]["prices"]["tokens_per_layer"] < 1
    assert ("dyvte", "prefill_flops", 0.75) not in rows and "dyvte at 0.75 of prefill_flops" in found["notes"]
    place = output / MODEL / "priced-policies" / "quecc-draw-1"
    policies = {file.name: PruningPolicy.load(file).keep for file in place.glob("keep-*.json")}
    assert {policies["keep-0.5.json"], policies["keep-0.25.json"]} == {16, 8} and len(policies) == 3

    def trains(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "_training", trains)
    assert json.loads((sweep(tmp_path, *ARGS) / MODEL / "prices.json").read_text()) == found
