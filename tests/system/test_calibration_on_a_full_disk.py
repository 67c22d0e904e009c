"""A calibration on a full disk goes on, and what could not be written is written by the next run."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from catp_lightning import PruningPolicy
from catp_lightning.calibration.replay.base import Replay
from tests.support.processes import free_port, in_fork
from tests.support.small_calibrations import calibrate, contents, full_disk

pytestmark = pytest.mark.usefixtures("saving_often")


class Disk(Callback):
    """Full from the first batch until the epoch ends, or for good."""

    def __init__(self, freed: bool) -> None:
        self.freed = freed
        self.full = full_disk(100)

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.full.__enter__()

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.freed:
            self.full.__exit__(None, None, None)


class Interrupted(Callback):
    """Stops a run at its first or second reading of a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            raise RuntimeError("planted")


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for every prompt that a calibration answers again."""
    found: list[int] = []
    real = Replay.answer_log_probability
    monkeypatch.setattr(Replay, "answer_log_probability", lambda *args: found.append(0) or real(*args))
    return found


class Taking(Callback):
    """Puts a folder where a file is to be written, when the loop has ended."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.file.mkdir(parents=True)


def _never(*args: Any) -> None:
    raise AssertionError("this was measured before")


@pytest.mark.slow
def test_a_calibration_that_cannot_save_its_part_warns_once_and_goes_on(policy: PruningPolicy, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="could not be saved") as told:
        found = calibrate(tmp_path / "p.json", Disk(freed=True)).policies
    assert found == [policy]
    (warning,) = [str(one.message) for one in told if "could not be saved" in str(one.message)]
    assert "p.json.partial-0.safetensors" in warning and "File too large" in warning
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p-report", "p.json"]


@pytest.mark.slow
def test_an_older_part_is_gone_on_with_after_a_run_that_could_save_none(
    policy: PruningPolicy, tmp_path: Path, probed: list[int]
) -> None:
    calibrate(tmp_path / "whole" / "p.json")
    path, every = tmp_path / "p.json", len(probed)
    with pytest.raises(RuntimeError, match="planted"):
        calibrate(path, Interrupted(2))
    saved = contents(tmp_path)
    disk = Disk(freed=False)
    with pytest.raises(RuntimeError, match="planted"), pytest.warns(UserWarning, match="could not be saved"):
        calibrate(path, disk, Interrupted(3))
    disk.full.__exit__(None, None, None)
    assert contents(tmp_path) == saved
    probed.clear()
    assert calibrate(path).policies == [policy]
    assert 0 < len(probed) < every, "two batches were not probed again"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["p.json", "p-report/report.md"])
def test_what_cannot_be_written_at_the_end_is_written_by_the_next_run_without_measuring_again(
    policy: PruningPolicy, tmp_path: Path, probed: list[int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, file = tmp_path / "p.json", tmp_path / name
    with pytest.raises(IsADirectoryError, match=r"Is a directory, so nothing was written; .*give a path") as told:
        calibrate(path, Taking(file))
    assert told.value.filename == str(file)
    assert (tmp_path / "p.json.partial-0.safetensors").is_file()
    file.rmdir()
    probed.clear()
    monkeypatch.setattr("catp_lightning.calibration.search.race.Race.compare", _never)
    assert calibrate(path).policies == [policy] and not probed
    assert sorted(one.name for one in tmp_path.iterdir()) == ["p-report", "p.json"]
    assert (tmp_path / "p-report/report.md").is_file()


@pytest.mark.slow
def test_two_processes_both_fail_where_the_first_cannot_write(tmp_path: Path) -> None:
    port = free_port()

    def work(rank: int) -> None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
        os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        calibrate(tmp_path / "p.json", *([] if rank else [Taking(tmp_path / "p.json")]), strategy="ddp", devices=2)

    for ended in in_fork(partial(work, 0), partial(work, 1), seconds=60):
        assert ended.code == 1 and "IsADirectoryError: [Errno 21] Is a directory, so nothing was written" in ended.said
    assert len(list(tmp_path.glob("p.json.partial-?.safetensors"))) == 2
