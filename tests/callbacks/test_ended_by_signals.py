"""SIGTERM and SIGINT end a run within seconds, with what was done saved, in real processes."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from catp_lightning import PruningPolicy, TokenPruning
from tests.support.answer_files import lines, named
from tests.support.answer_files import write_answers as answer
from tests.support.interrupted_calibrations import PARTIAL, read, sorted_batches
from tests.support.modules import Generating
from tests.support.processes import Ended, in_fork, in_program, ranks
from tests.support.sent_signals import calibrate, kill_at, quick
from tests.support.trainers import loading, trainer

pytestmark = pytest.mark.usefixtures("no_report")

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


def killed(path: Path, call: int, number: int, where: str, **settings: Any) -> Ended:
    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        kill_at(call, number, where)
        try:
            calibrate(path, **settings)
        except SystemExit as ended:
            os._exit(ended.code)

    start = time.monotonic()
    (ended,) = in_fork(work)
    assert time.monotonic() - start < 45
    return ended


@pytest.mark.parametrize(
    ("call", "number", "where"),
    [
        (4, signal.SIGTERM, "probe"),
        (6, signal.SIGINT, "step"),
        pytest.param(9, signal.SIGTERM, "compare", marks=pytest.mark.slow),
        pytest.param(1, signal.SIGINT, "report", marks=pytest.mark.slow),
    ],
)
def test_a_signal_in_any_stage_ends_a_calibration_and_the_next_run_goes_on(
    undisturbed: bytes, tmp_path: Path, call: int, number: signal.Signals, where: str
) -> None:
    path = tmp_path / "p.json"
    ended = killed(path, call, number, where)
    assert ended.code == CODES[number], ended.said
    (said,) = [line for line in ended.said.splitlines() if "same command goes on" in line]
    assert number.name in said and str(tmp_path / PARTIAL) in said
    assert not list(tmp_path.glob(".*")), "no lock is left"
    metadata, tensors = read(tmp_path / PARTIAL)
    stages = json.loads(metadata["stages"])
    assert any(batches for _, batches in stages)
    if where == "probe":  # in the middle of a batch
        assert 0 < stages[0][1] == len(tensors["data"]) < 7
        assert int(tensors["0/parts/counts"].sum()) == 5 * stages[0][1], "sums of whole batches"
    calibrate(path)
    assert path.read_bytes() == undisturbed


def test_before_the_first_batch_is_measured_there_is_nothing_to_save(tmp_path: Path) -> None:
    ended = killed(tmp_path / "p.json", 1, signal.SIGTERM, "step")
    assert ended.code == 143, ended.said
    assert "ended by SIGTERM, before a batch was measured: the same command goes on from the start." in ended.said
    assert not list(tmp_path.iterdir())


def test_every_process_saves_its_part_and_ends(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        kill_at(2 if rank else 3, signal.SIGTERM, "probe")
        try:
            calibrate(tmp_path / "p.json", strategy="ddp", devices=2)
        except SystemExit as ended:
            os._exit(ended.code)

    for ended in in_fork(*ranks(work, 2), seconds=60):
        assert ended.code == 143, ended.said
    assert len(list(tmp_path.iterdir())) == 2


LAUNCHED = """
import os, signal, sys
from pathlib import Path
from tests.support.sent_signals import calibrate, kill_at

if __name__ == "__main__":
    if "LOCAL_RANK" not in os.environ:  # the first process, which Lightning lets start the other
        kill_at(3, signal.SIGTERM, "probe")
    calibrate(Path(sys.argv[1]), strategy="ddp", devices=2)
"""


@pytest.mark.slow
def test_the_process_that_started_the_others_ends_them_and_is_not_killed_by_lightning(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(LAUNCHED)
    (folder := tmp_path / "found").mkdir()
    command = [str(tmp_path / "program.py"), str(folder / "p.json")]
    (ended,) = in_program((command, {}), seconds=200)
    assert ended.code == 143 and not ended.left, ended.said
    assert ended.said.count("the same command goes on") == 1
    assert {file.name for file in folder.iterdir()} == {PARTIAL, PARTIAL.replace("0", "1")}, "no lock is left"
    (ended,) = in_program((command, {}), seconds=200)
    assert ended.code == 0 and "batches of an interrupted calibration are taken over" in ended.said, ended.said
    assert not list(folder.glob("*partial*")) and (folder / "p.json").is_file()


def ended_by_sigterm(work: Callable[[], object]) -> Ended:
    def ending() -> None:
        try:
            work()
        except SystemExit as ended:
            os._exit(ended.code)

    (ended,) = in_fork(ending)
    return ended


def sent_and_slept(ids: list[int]) -> list[dict[str, Any]]:
    if 2 in ids:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(60)
    return named(ids)


def test_a_prediction_ends_at_once_and_its_answers_are_kept(tmp_path: Path) -> None:
    ended = ended_by_sigterm(lambda: answer(tmp_path / "answers.jsonl", sent_and_slept))
    assert ended.code == 143, ended.said
    assert [file.name for file in tmp_path.iterdir()] == ["answers.rank0.jsonl"]
    assert len(lines(tmp_path / "answers.rank0.jsonl")) == 2


def test_a_pruned_prediction_and_a_pruned_test_end_at_once(tmp_path: Path) -> None:
    def work(stage: str) -> None:
        kill_at(1, signal.SIGTERM, "step")
        Generating.test_step = Generating.predict_step  # type: ignore[assignment]
        run = trainer(TokenPruning(PruningPolicy("catp", keep=0.5)), devices=1)
        getattr(run, stage)(Generating(), loading(sorted_batches()))

    for stage in ("predict", "test"):
        ended = ended_by_sigterm(lambda stage=stage: work(stage))
        assert ended.code == 143, ended.said


def test_handlers_are_called_and_given_back(tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, own := lambda number, frame: heard.append(number))
    try:
        with pytest.raises(SystemExit) as ended:
            answer(tmp_path / "answers.jsonl", lambda ids: os.kill(os.getpid(), signal.SIGTERM) or named(ids))
        assert ended.value.code == 143 and heard == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is own
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        answer(tmp_path / "answers.jsonl", lambda ids: os.kill(os.getpid(), signal.SIGTERM) or named(ids))
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN, "who ignores it goes on ignoring it"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_handler_that_requeues_the_job_is_not_interrupted(tmp_path: Path) -> None:
    """SLURM sends SIGUSR1 before SIGTERM, and may send the latter while the job is being put back in the queue."""
    told: list[str] = []

    def requeue(number: int, frame: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        told.append("requeued")

    def step(ids: list[int]) -> list[dict[str, Any]]:
        os.kill(os.getpid(), signal.SIGUSR1)
        told.append("batch")
        return named(ids)

    before = signal.signal(signal.SIGUSR1, requeue)
    try:
        with pytest.raises(SystemExit) as ended:
            answer(tmp_path / "answers.jsonl", step)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert ended.value.code == 143 and told == ["requeued", "batch"], "it ended before the second batch"


def test_in_a_thread_nothing_is_installed(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in signal.valid_signals()]
    thread = threading.Thread(target=answer, args=(tmp_path / "answers.jsonl",))
    thread.start()
    thread.join(60)
    assert lines(tmp_path / "answers.jsonl") == named([0, 1, 2, 3, 4])
    assert [signal.getsignal(number) for number in signal.valid_signals()] == before


class Second(Callback):
    """Calibrates at the same path while the first does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_predict_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            (ended,) = in_fork(lambda: calibrate(self.path))
            assert ended.code == 1 and "PolicyError" in ended.said
            assert f"that has not ended is writing to '{self.path}': process {os.getpid()} on " in ended.said
            assert "elete" not in ended.said.rpartition("PolicyError")[2]


@pytest.mark.slow
def test_a_second_calibration_is_told_that_one_is_running(tmp_path: Path, undisturbed: bytes) -> None:
    path = tmp_path / "p.json"
    trainer(Second(path), quick(path), devices=1).predict(Generating(), loading(sorted_batches()))
    assert path.read_bytes() == undisturbed
    assert [file.name for file in tmp_path.iterdir()] == ["p.json"]
