"""Figures in Trackio, whose run is given to Lightning's logger for W&B; skipped where Trackio is not installed."""

import csv
import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from catp_lightning import TokenPruning
from tests.support.modules import Answering
from tests.support.policies import HALF
from tests.support.small_calibrations import calibrate
from tests.support.trainers import trainer


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The last value of each of our figures."""
    named = {name: value for row in rows for name, value in row.items() if name.startswith("catp/") and value != ""}
    return {name: float(value) for name, value in named.items()}


def test_trackio_has_the_same_figures_as_a_csv_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    trackio = pytest.importorskip("trackio", reason="trackio is not installed: pip install trackio")

    run = trackio.init(project="catp", name="one", embed=False)
    loggers = [WandbLogger(experiment=run), CSVLogger(tmp_path / "csv")]
    module, pruning = Answering(), TokenPruning(HALF, log_images=2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(pruning, logger=loggers).validate(module, module.loader())
        calibrate(tmp_path / "policy.json", logger=loggers)
    trackio.finish()
    assert not [one for one in told if "could not be logged" in str(one.message) or "skipped" in str(one.message)]

    loggers[1].save()
    with (Path(loggers[1].log_dir) / "metrics.csv").open() as file:
        expected = figures(list(csv.DictReader(file)))
    assert {"catp/keep_share", "catp/tokens_kept"} < expected.keys(), "and those of a calibration"
    assert figures(trackio.SQLiteStorage.get_logs("catp", "one")) == pytest.approx(expected, rel=1e-6)
