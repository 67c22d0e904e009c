"""Calibrated policies in a sweep: parts of the split, draws, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from catp_lightning.errors import PolicyError
from catp_lightning.evaluation.sweep.reading import Reading, calibration_draws
from catp_lightning.policy import PruningPolicy
from tests.support.sweeps import sweep, table


def test_a_calibration_split_is_divided_into_parts_that_share_nothing() -> None:
    data = list(range(50))
    loader = torch.utils.data.DataLoader(data, batch_size=8, collate_fn=tuple)  # type: ignore[arg-type]
    reading = Reading(None, None, lambda: loader, None, torch.device("cpu"), {})  # type: ignore[arg-type]
    assert calibration_draws(reading, 1) == [loader]
    parts = [[sample for batch in part for sample in batch] for part in calibration_draws(reading, 3)]
    assert sorted(sample for part in parts for sample in part) == data and [len(part) for part in parts] == [16, 17, 17]
    assert calibration_draws(replace(reading, calibration=None), 3) == []
    with pytest.raises(PolicyError, match=r"calibration_draws is 51, but .* cannot be divided"):
        calibration_draws(reading, 51)


@pytest.mark.slow
def test_several_calibrations_are_one_row_with_their_spread(tmp_path: Path) -> None:
    args = ["--models", "digits_blip2", "--scorers", "calibrated stride", "--keep", "0.125", "--calibration_draws", "3"]
    sweep(tmp_path, *args, "--questions", "40", "--calibration_questions", "32")
    row = table(tmp_path)["calibrated stride", "0.125"]
    assert len(row["agreement_draws"]) == 3 and row["agreement"] == pytest.approx(np.mean(row["agreement_draws"]))
    images = [
        PruningPolicy.load(tmp_path / "digits_blip2/policies" / name).evidence["images"]
        for name in ("calibrated-stride", "calibrated-stride-draw-2", "calibrated-stride-draw-3")
    ]
    assert len(set(map(str, images))) == 3
    assert "agreement over draws" in (tmp_path / "digits_blip2/table.md").read_text()


@pytest.mark.slow
def test_calibrated_is_measured_once_and_is_the_reference(tmp_path: Path, capsys) -> None:
    scorers = "self-attention,calibrated,calibrated self-attention"
    args = ["--models", "digits_blip2", "--scorers", scorers, "--keep", "0.125", "--calibration_draws", "1"]
    sweep(tmp_path, *args, "--questions", "40", "--calibration_questions", "64")
    found = table(tmp_path)
    own = PruningPolicy.load(tmp_path / "digits_blip2/policies/calibrated-self-attention")
    assert own.scorer == "self-attention" and ("calibrated self-attention", "0.125") in found
    assert (
        "reference_ahead" in found["self-attention", "0.125"] and "reference_ahead" not in found["calibrated", "0.125"]
    )
    ratio = found["calibrated", "0.125"]["accuracy"] / found["self-attention", "0.125"]["accuracy"]
    assert f" | {ratio:.2f} |" in (tmp_path / "digits_blip2/table.md").read_text()
    policy = PruningPolicy.load(tmp_path / "digits_blip2/policies/calibrated/keep-0.125.json")
    assert policy.keep == 0.125 and policy.evidence["chosen"]
    written = (tmp_path / "digits_blip2/policies/calibrated/keep-0.125.json").stat().st_mtime_ns
    assert "Calibrating." in capsys.readouterr().out
    sweep(tmp_path, *args, "--questions", "48", "--calibration_questions", "64")  # other questions, the same policy
    assert "Calibrating." not in capsys.readouterr().out
    assert (tmp_path / "digits_blip2/policies/calibrated/keep-0.125.json").stat().st_mtime_ns == written
    sweep(tmp_path, *args, "--questions", "48", "--calibration_questions", "72")
    assert (tmp_path / "digits_blip2/policies/calibrated/keep-0.125.json").stat().st_mtime_ns > written


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_calibration_that_is_refused_is_a_note(tmp_path: Path) -> None:
    args = ["--models", "digits_blip2", "--scorers", "calibrated,stride", "--keep", "4"]
    args += ["--questions", "8", "--calibration_questions", "2"]
    output = sweep(tmp_path, *args)
    assert table(output).keys() == {("no pruning", "None"), ("stride", "4")}
    text = (output / "digits_blip2/table.md").read_text()
    assert "- calibrated: Calibration needs samples in every part of its split" in text
    assert "The reference is *stride*" in text
    before = {path: path.stat().st_mtime_ns for path in (output / "digits_blip2/policies").iterdir()}
    sweep(tmp_path, *args)
    assert {path: path.stat().st_mtime_ns for path in (output / "digits_blip2/policies").iterdir()} == before
