"""Loggers that fail cost nothing but a warning."""

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from catp_lightning import PruningPolicy, TokenPruning
from tests.support.processes import in_program
from tests.support.small_calibrations import calibrate, predict

pytestmark = pytest.mark.usefixtures("saving_often")


class Failing(Logger):
    """Raises whenever it is told something."""

    name, version = "failing", 0  # type: ignore[assignment]

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        raise ConnectionError("the service is gone")

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


def test_a_logger_that_fails_costs_a_calibration_nothing_but_a_warning(policy: PruningPolicy, tmp_path: Path) -> None:
    other = CSVLogger(tmp_path / "csv")
    with pytest.warns(UserWarning, match="could not be logged") as told:
        found = calibrate(tmp_path / "p.json", logger=[Failing(), other]).policies
    (warning,) = [str(one.message) for one in told if "could not be logged" in str(one.message)]
    assert "p-report" in warning and warning.endswith("to Failing (ConnectionError: the service is gone).")
    assert found == [policy] == [PruningPolicy.load(tmp_path / "p.json")]
    assert (tmp_path / "p-report/report.md").is_file() and not list(tmp_path.glob("*partial*"))
    other.save()
    assert "catp/keep-0.5/agreement" in (Path(other.log_dir) / "metrics.csv").read_text()


def test_a_logger_that_fails_costs_a_prediction_nothing_but_a_warning(tmp_path: Path) -> None:
    expected = predict(TokenPruning(PruningPolicy(keep=0.5)))
    other = CSVLogger(tmp_path / "csv")
    with pytest.warns(UserWarning, match=r"catp/tokens_kept 2, catp/keep_share 0.5 could not be logged.* to Failing "):
        found = predict(TokenPruning(PruningPolicy(keep=0.5)), logger=[Failing(), other])
    assert len(found) == 4 and all(map(torch.equal, found, expected))
    other.save()
    assert "catp/tokens_kept" in (Path(other.log_dir) / "metrics.csv").read_text()


@pytest.fixture
def wandb_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B reads the environment once in a process."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.mark.slow
@pytest.mark.usefixtures("wandb_anew")
def test_under_a_disabled_run_of_wandb_a_calibration_is_what_it_is_without(
    policy: PruningPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = WandbLogger(save_dir=str(tmp_path))
    place = Path(logger.experiment.dir)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = calibrate(tmp_path / "p.json", logger=logger).policies
    wandb.finish()
    assert found == [policy] and not [one for one in told if "could not" in str(one.message)]
    assert not list(place.glob("**/*.json")), "nothing is left in a folder that nobody looks into"


@pytest.mark.slow
@pytest.mark.usefixtures("wandb_anew")
def test_where_the_folder_of_a_wandb_run_cannot_be_written_the_policy_is_saved_all_the_same(
    policy: PruningPolicy, tmp_path: Path
) -> None:
    import wandb

    logger = WandbLogger(project="catp", save_dir=str(tmp_path), offline=True)
    place = Path(logger.experiment.dir)
    shutil.rmtree(place)
    place.write_text("in the way")
    with pytest.warns(UserWarning, match=r"p-report; it could not be logged.*WandbLogger \(NotADirectoryError"):
        found = calibrate(tmp_path / "p.json", logger=logger).policies
    place.unlink()
    wandb.finish()
    assert found == [policy] == [PruningPolicy.load(tmp_path / "p.json")]
    assert (tmp_path / "p-report/report.md").is_file()


KILLED_SERVICE = """
import os, signal, sys, time
from pathlib import Path
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch import Callback
from catp_lightning import PruningPolicy, TokenPruning
from tests.support.small_calibrations import calibrate, predict

class Kills(Callback):
    def on_predict_batch_start(self, *args):
        for number in filter(str.isdigit, os.listdir("/proc")):
            try:
                name, _, rest = Path(f"/proc/{number}/stat").read_text().partition(")")
            except OSError:
                continue
            if "wandb" in name and rest.split()[1] == str(os.getpid()) and rest.split()[0] != "Z":
                os.kill(int(number), signal.SIGKILL)
                print("killed")
        time.sleep(0.1)

folder = Path(sys.argv[1])
logger = WandbLogger(project="catp", save_dir=str(folder), offline=True)
logger.experiment
calibrate(folder / "p.json", Kills(), logger=logger)
print(len(predict(TokenPruning(PruningPolicy(keep=0.5)), logger=logger)), "predictions")
"""


@pytest.mark.slow
def test_where_the_service_of_wandb_is_killed_policy_report_and_predictions_are_there(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(KILLED_SERVICE)
    (ended,) = in_program(([str(program), str(tmp_path)], {"WANDB_SILENT": "true"}), seconds=120)
    assert "killed" in ended.said and "4 predictions" in ended.said, ended.said
    assert ended.said.count("could not be logged") == 2, "the calibration told of it, and the prediction"
    assert (tmp_path / "p-report/report.md").is_file() and PruningPolicy.load(tmp_path / "p.json").keep == 0.5
    assert json.loads((tmp_path / "p.json").read_text())["stages"][0]["keep"] == {"share": 0.5}
