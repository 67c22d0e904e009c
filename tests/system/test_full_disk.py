"""A full disk, a closed folder, a process that is killed, a logger that fails: what is kept, and what is told."""

import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from torch.utils.data import DataLoader

from catp_lightning import AnswerWriter, CrossAttentionCalibration, PolicyError, PruningPolicy, TokenPruning
from catp_lightning.calibration import checkpoint as resume
from catp_lightning.calibration import split
from catp_lightning.calibration.checkpoint import CalibrationCheckpoint
from catp_lightning.calibration.fit.sums import PartCounts
from catp_lightning.calibration.replay.base import Replay
from catp_lightning.calibration.report.report import report
from catp_lightning.cli.sweep import save_all
from catp_lightning.data.scenes import write_scenes
from catp_lightning.evaluation.comparison import Comparison, save_comparison
from catp_lightning.evaluation.sweep.table import ModelTable
from catp_lightning.utils.files import check_writable, write_bytes
from tests.support.answer_files import Returning, named
from tests.support.comparisons import comparison
from tests.support.processes import Ended, free_port, in_fork, in_program
from tests.support.small_calibrations import Counting, calibrate, contents, data, full_disk, predict
from tests.support.trainers import loading, trainer

NOBODY = 65534


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    """A calibration saves after every batch, and has two rounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "EVERY", 1)
        patch.setattr(split, "FIRST_ROUND", 8)
        yield


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> PruningPolicy:
    """Of a calibration that nothing disturbs."""
    return calibrate(tmp_path_factory.mktemp("undisturbed") / "p.json").policies[0]


# What is written whole or not at all.


def _tables(folder: Path, which: int) -> None:
    same = {"control": False, "tokens": 2.0, "agreement_interval": [0.1, 0.9]}
    rows = [{"method": "a", "keep": None, **same, "agreement": 1.0}, {"method": "b", "keep": 1, **same}]
    rows[1] |= {"agreement": 0.5 - which / 4, "reference_ahead": 0.1, "reference_ahead_interval": [0.0, 0.2]}
    save_all([ModelTable("m", "3 questions.", "b", rows)], folder)


def _compared(folder: Path, which: int) -> None:
    given = comparison()
    save_comparison(Comparison(given.images, given.reference, given.results[which:]), folder, "title")


def _answers(folder: Path, which: int) -> None:
    run = trainer(AnswerWriter(str(folder / "answers.jsonl")), devices=1)
    run.predict(Returning(named), DataLoader(torch.arange(100 + which), batch_size=50))


def _report(policy: PruningPolicy, folder: Path, which: int) -> None:
    report([policy], [], folder, [], 1.0 + which)


WRITERS: dict[str, Callable[[Path, int], object]] = {
    "a policy": lambda folder, which: PruningPolicy(evidence={"long": [which] * 2000}).save(folder),
    "a comparison": _compared,
    "the tables of a sweep": _tables,
    "scenes": lambda folder, which: write_scenes(folder, "test", 4, seed=which),
    "answers": _answers,
}


def on_a_disk_that_fills_up(write: Callable[[Path, int], object], folder: Path) -> None:
    """After each failure every file is the old one or the new one, whole, and there is no other."""
    now, then, disk = folder / "now", folder / "then", folder / "disk"
    write(now, 0)
    write(then, 1)
    old, new = contents(now), contents(then)
    failures = 0
    for most in sorted({1, 200, *(len(content) - 1 for content in new.values())}):
        shutil.rmtree(disk, ignore_errors=True)
        shutil.copytree(now, disk)
        with full_disk(most), pytest.raises(OSError, match="File too large, so nothing was written") as told:
            write(disk, 1)
        assert Path(str(told.value.filename)).parent in (disk, disk / "images"), "it names the file"
        for name, content in contents(disk).items():
            assert content in (old.get(name), new.get(name)) or "rank0" in name, name  # answers up to then are kept
        failures += 1
    assert failures >= 2
    write(disk, 1)
    assert {name: content for name, content in contents(disk).items() if name in new} == new


@pytest.mark.parametrize("name", WRITERS)
def test_on_a_full_disk_every_file_is_the_old_one_or_the_new_one(name: str, tmp_path: Path) -> None:
    on_a_disk_that_fills_up(WRITERS[name], tmp_path)


def test_on_a_full_disk_a_report_is_the_old_one_or_the_new_one(policy: PruningPolicy, tmp_path: Path) -> None:
    on_a_disk_that_fills_up(partial(_report, policy), tmp_path)


@pytest.mark.slow
def test_on_a_file_system_that_is_really_full_nothing_is_damaged_either(tmp_path: Path) -> None:
    """Needs root, to mount one of 64 KiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root mounts file systems")
    try:
        old = PruningPolicy(evidence={"long": [1] * 1000})
        old.save(tmp_path)
        before = contents(tmp_path)
        with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device, so nothing was written"):
            PruningPolicy(evidence={"long": [2] * 20_000}).save(tmp_path)
        assert contents(tmp_path) == before
        write_bytes(tmp_path / "filling", bytes(40_000))
        with pytest.raises(OSError, match="No space left on device"):
            while True:
                write_bytes(tmp_path / f"filling {len(contents(tmp_path))}", bytes(4096))
        with pytest.raises(OSError, match="No space left on device"):
            calibrate(tmp_path / "new" / "p.json")
        assert PruningPolicy.load(tmp_path) == old
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# A calibration.


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


def test_a_calibration_that_cannot_save_its_part_warns_once_and_goes_on(policy: PruningPolicy, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="could not be saved") as told:
        found = calibrate(tmp_path / "p.json", Disk(freed=True)).policies
    assert found == [policy]
    (warning,) = [str(one.message) for one in told if "could not be saved" in str(one.message)]
    assert "p.json.partial-0.safetensors" in warning and "File too large" in warning
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p-report", "p.json"]


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


class Taking(Callback):
    """Puts a folder where a file is to be written, when the loop has ended."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.file.mkdir(parents=True)


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


def _never(*args: Any) -> None:
    raise AssertionError("this was measured before")


def test_two_processes_both_fail_where_the_first_cannot_write(tmp_path: Path) -> None:
    port = free_port()

    def work(rank: int) -> None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
        os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        calibrate(tmp_path / "p.json", *([] if rank else [Taking(tmp_path / "p.json")]), strategy="ddp", devices=2)

    for ended in in_fork(partial(work, 0), partial(work, 1), seconds=60):
        assert ended.code == 1 and "IsADirectoryError: [Errno 21] Is a directory, so nothing was written" in ended.said
    assert len(list(tmp_path.glob("p.json.partial-?.safetensors"))) == 2


# A place that cannot be written is refused before anything is asked.


def places(folder: Path) -> dict[str, tuple[Path, type[OSError]]]:
    (folder / "file").write_text("")
    (folder / "folder.json").mkdir()
    (folder / "closed").mkdir(mode=0o555)
    return {
        "below a file": (folder / "file" / "new" / "p.json", NotADirectoryError),
        "a folder": (folder / "folder.json", IsADirectoryError),
        "/proc": (Path("/proc/new/p.json"), FileNotFoundError),
        "read-only": (folder / "closed" / "new" / "p.json", PermissionError),
    }


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may write anywhere."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if before == 0:
            os.seteuid(0)


PLACES = ["below a file", "a folder", "/proc", "read-only"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("writer", [CrossAttentionCalibration, AnswerWriter])
def test_a_place_that_cannot_be_written_is_refused_before_the_first_batch(writer: Any, place: str) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        os.chmod(name, 0o755)
        path, kind = places(Path(name))[place]
        before = sorted(Path(name).rglob("*"))
        module = Counting()
        run = Trainer(
            accelerator="cpu", callbacks=[writer(str(path))], logger=False, enable_progress_bar=False,
            enable_checkpointing=False, default_root_dir=name,
        )  # fmt: skip
        with as_nobody(), pytest.raises(kind, match=re_said(place)):
            run.predict(module, loading(data()))
        assert module.steps == 0 and sorted(Path(name).rglob("*")) == before


def re_said(place: str) -> str:
    return "is a folder|Is a directory" if place == "a folder" else "so nothing was written; free space, or give a path"


def test_a_full_disk_and_a_report_that_is_a_file_are_found_before_the_first_batch_too(tmp_path: Path) -> None:
    with full_disk(0), pytest.raises(OSError, match="File too large"):
        check_writable(tmp_path / "new" / "p.json")
    (tmp_path / "p-report").write_text("")
    with pytest.raises(NotADirectoryError, match="p-report"):
        calibrate(tmp_path / "p.json")
    check_writable(tmp_path / "new" / "p.json")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p-report"], "asking leaves nothing"


@pytest.mark.parametrize("place", PLACES)
def test_a_policy_that_cannot_be_saved_says_where_and_what_to_do(place: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        path, _ = places(Path(name))[place]
        with as_nobody(), pytest.raises(OSError, match="so nothing was written; free space, or give a path") as told:
            PruningPolicy().save(path)
        assert told.value.filename == str(path)
        assert not list(Path(name).rglob("*.tmp"))


# A process that is killed.


def killed_at(name: str, nth: int, work: Callable[[], object]) -> Ended:
    """Run `work` in a process that kills itself at its n-th call of `os.<name>`."""

    def dying() -> None:
        real, calls = getattr(os, name), []

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(0)
            if len(calls) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(os, name, call)
        work()

    return in_fork(dying, seconds=60)[0]


KILLED: dict[str, Callable[[Path, int], object]] = {
    "a policy": lambda folder, which: PruningPolicy(keep=0.5, evidence={"long": [which] * 999}).save(
        folder / "keep-0.5.json"
    ),
    "answers": _answers,
}


@pytest.mark.parametrize("name", KILLED)
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_killed_while_it_is_written_a_file_is_the_old_one(name: str, moment: str, tmp_path: Path) -> None:
    KILLED[name](tmp_path, 0)
    before = contents(tmp_path)
    assert killed_at(moment, 1, lambda: KILLED[name](tmp_path, 1)).code == -signal.SIGKILL
    after = contents(tmp_path)
    new = after.keys() - before.keys()
    (left,) = (one for one in new if "rank0" not in one and not one.endswith(".lock"))  # answers up to then, its lock
    assert left.endswith(".tmp") and {key: after[key] for key in before} == before
    if name == "a policy":
        assert PruningPolicy.load(tmp_path).evidence == {"long": [0] * 999}, "what was left is no policy"
        assert PruningPolicy.load(tmp_path, keep=0.5).evidence == {"long": [0] * 999}
        (tmp_path / "keep-0.5.json").unlink()
        with pytest.raises(PolicyError, match="There is no policy"):
            PruningPolicy.load(tmp_path)


def test_killed_at_any_moment_a_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    """A process writes two policies in turn, as fast as it can."""
    two = [PruningPolicy(evidence={"long": [n] * 9999}) for n in range(2)]

    def write() -> None:
        while True:
            for one in two:
                one.save(tmp_path)

    chance, left, kills = random.Random(0), 0, 0
    file = two[0].save(tmp_path)
    while kills < 20 or not left:
        kills += 1
        assert kills < 500, "not one was killed in the middle"
        before = file.stat().st_mtime_ns
        child = os.fork()
        if not child:
            try:
                write()
            finally:
                os._exit(1)
        while file.stat().st_mtime_ns == before:  # it has begun, however busy the machine is
            time.sleep(0.001)
        time.sleep(0.02 * chance.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert PruningPolicy.load(tmp_path) in two
        left = len(list(tmp_path.glob(".*.tmp")))


def test_what_a_kill_left_is_never_taken_for_a_part_of_a_calibration(tmp_path: Path) -> None:
    found = {"parts": PartCounts()}
    whole = CalibrationCheckpoint(tmp_path / "sums", {})
    whole.begin("probe", found)
    (tmp_path / ".sums.abc.tmp").write_bytes(b"half")
    again = CalibrationCheckpoint(tmp_path / "sums", {})
    assert again.begin("probe", found) == 0
    again.delete()
    assert not list(tmp_path.iterdir())


def test_a_part_that_lacks_its_end_is_refused_whatever_its_length(tmp_path: Path) -> None:
    partial, found = CalibrationCheckpoint(tmp_path / "sums", {"a": 1}), {"parts": PartCounts()}
    partial.begin("probe", found)
    found["parts"].update(torch.tensor([0, 1, 1]))
    partial.add((1, 2), found)
    content = (tmp_path / "sums").read_bytes()
    assert CalibrationCheckpoint(tmp_path / "sums", {"a": 1}).begin("probe", {"parts": PartCounts()}) == 1
    for length in range(len(content)):
        (tmp_path / "sums").write_bytes(content[:length])
        with pytest.raises(PolicyError, match=r"cannot be read as part of a calibration .*Delete it to start anew"):
            CalibrationCheckpoint(tmp_path / "sums", {"a": 1})


# Loggers.


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


@pytest.mark.usefixtures("wandb_anew")
@pytest.mark.parametrize("how", ["by the environment", "by the logger"])
def test_under_a_disabled_run_of_wandb_a_calibration_is_what_it_is_without(
    how: str, policy: PruningPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    if how == "by the environment":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = WandbLogger(save_dir=str(tmp_path), **({} if how == "by the environment" else {"mode": "disabled"}))
    place = Path(logger.experiment.dir)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = calibrate(tmp_path / "p.json", logger=logger).policies
    wandb.finish()
    assert found == [policy] and not [one for one in told if "could not" in str(one.message)]
    assert not list(place.glob("**/*.json")), "nothing is left in a folder that nobody looks into"


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
    assert json.loads((tmp_path / "p.json").read_text())["keep"] == {"share": 0.5}
