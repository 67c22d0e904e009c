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
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, RandomSampler, Sampler

from catp_lightning import (
    AnswerWriter,
    CrossAttentionCalibration,
    PolicyError,
    PruningError,
    PruningPolicy,
    TokenPruning,
)
from catp_lightning.calibration.replay.base import Replay
from catp_lightning.utils.locks import only_run, refuse_running
from tests.support.answer_files import Returning, lines, named
from tests.support.answer_files import write_answers as answer
from tests.support.interrupted_calibrations import PARTIAL, calibrate, data, read, small
from tests.support.modules import Generating
from tests.support.processes import Ended, in_fork, in_program, ranks
from tests.support.sent_signals import kill_at
from tests.support.trainers import loading, trainer

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch.setattr)
    monkeypatch.setattr("catp_lightning.calibration.checkpoint.EVERY", 100)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        small(patch.setattr)
        calibrate(path := tmp_path_factory.mktemp("undisturbed") / "p.json")
    return path.read_bytes()


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
        (11, signal.SIGTERM, "probe"),
        (6, signal.SIGINT, "step"),
        pytest.param(12, signal.SIGTERM, "compare", marks=pytest.mark.slow),
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
    metadata, _ = read(tmp_path / PARTIAL)
    assert any(batches for _, batches in json.loads(metadata["stages"]))
    calibrate(path)
    assert path.read_bytes() == undisturbed


def test_a_signal_in_the_middle_of_a_batch_saves_the_sums_of_whole_batches(tmp_path: Path) -> None:
    ended = killed(tmp_path / "p.json", 11, signal.SIGTERM, "probe")
    assert ended.code == 143, ended.said
    metadata, tensors = read(tmp_path / PARTIAL)
    ((_, batches),) = json.loads(metadata["stages"])
    assert 0 < batches == len(tensors["data"]) < 7
    assert int(tensors["0/parts/counts"].sum()) == 5 * batches


def test_before_the_first_batch_is_measured_there_is_nothing_to_save(tmp_path: Path) -> None:
    ended = killed(tmp_path / "p.json", 1, signal.SIGTERM, "step")
    assert ended.code == 143, ended.said
    assert "ended by SIGTERM, before a batch was measured: the same command goes on from the start." in ended.said
    assert not list(tmp_path.iterdir())


def test_every_process_saves_its_part_and_ends(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        kill_at(4 if rank else 5, signal.SIGTERM, "probe")
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
from tests.support.interrupted_calibrations import calibrate
from tests.support.sent_signals import kill_at

if __name__ == "__main__":
    if "LOCAL_RANK" not in os.environ:  # the first process, which Lightning lets start the other
        kill_at(5, signal.SIGTERM, "probe")
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
        getattr(run, stage)(Generating(), loading(data()))

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


# A second run, while the first is alive or dead.


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


def test_a_second_calibration_is_told_that_one_is_running(tmp_path: Path, undisturbed: bytes) -> None:
    path = tmp_path / "p.json"
    callbacks = [Second(path), CrossAttentionCalibration(path, keep=0.25)]
    trainer(*callbacks, devices=1).predict(Generating(), loading(data()))
    assert path.read_bytes() == undisturbed
    assert [file.name for file in tmp_path.iterdir()] == ["p.json"]


def test_a_lock_of_a_dead_process_is_free_and_new_folders_are_removed_with_it(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "file"

    def dying() -> None:
        with only_run(file, 3, PolicyError):
            os.kill(os.getpid(), signal.SIGKILL)

    in_fork(dying)
    assert [one.name for one in file.parent.iterdir()] == [".file.3.lock"]
    refuse_running(file, PolicyError)
    assert not list(file.parent.iterdir())
    with only_run(file, 3, PolicyError):
        for wait in (lambda: refuse_running(file, PolicyError), only_run(file, 3, PolicyError).__enter__):
            with pytest.raises(PolicyError, match=rf"has not ended is writing to '.*': process {os.getpid()} on"):
                wait()
    assert not list(file.parent.iterdir())
    with only_run(tmp_path / "c" / "d" / "file", 0, PolicyError):
        pass
    assert [one.name for one in tmp_path.iterdir()] == ["a"]


# What is refused before anything is measured.


class Turning(Sampler[int]):
    """Another order each time, without chance."""

    def __init__(self) -> None:
        self.readings = 0

    def __iter__(self) -> Any:
        self.readings += 1
        return iter(range(self.readings, self.readings + 4))

    def __len__(self) -> int:
        return 4


def refused(path: Path, loader: Any, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> str:
    monkeypatch.setattr(Replay, "answer_log_probability", lambda *args: pytest.fail("this is measured"))
    callback = CrossAttentionCalibration(path / "new" / "p.json", keep=0.25, **settings)
    with pytest.raises((PolicyError, PruningError)) as told:
        trainer(callback, devices=1).predict(Generating(), loader)
    assert not list(path.iterdir())
    return str(told.value)


@pytest.mark.parametrize("kind", ["shuffle", "random", "own", "without batches", "iterator"])
def test_a_loader_of_another_order_each_time_is_refused_before_anything_is_measured(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = data()
    samples = [{name: value[n] for name, value in batch.items()} for batch in batches for n in range(5)]
    loader = {
        "shuffle": lambda: DataLoader(samples, batch_size=5, shuffle=True),  # type: ignore[arg-type]
        "random": lambda: DataLoader(samples, batch_size=5, sampler=RandomSampler(range(35), num_samples=30)),  # type: ignore[arg-type]
        "own": lambda: DataLoader(samples, batch_size=2, sampler=Turning()),  # type: ignore[arg-type]
        "without batches": lambda: DataLoader(batches, batch_size=None, shuffle=True),  # type: ignore[arg-type]
        "iterator": lambda: iter(batches),
    }[kind]()
    said = refused(tmp_path, loader, monkeypatch)
    assert "reads its split several times" in said
    assert ("is an iterator" if kind == "iterator" else "gives another order each time") in said


@pytest.mark.parametrize("whole", [True, False])
def test_a_promise_that_the_split_is_too_small_for_is_refused_before_anything_is_measured(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = data()
    samples = [{name: value[n] for name, value in batch.items()} for batch in batches for n in range(5)]
    loader = loading(batches) if whole else DataLoader(samples, batch_size=5)  # type: ignore[arg-type]
    said = refused(tmp_path, loader, monkeypatch, max_disagreement=0.02)
    assert f"at most {70 if whole else 35} samples" in said and "takes at least 149 there" in said


def test_a_split_in_one_order_is_not_disturbed_by_looking_at_it(tmp_path: Path, undisturbed: bytes) -> None:
    samples = [{name: value[n] for name, value in batch.items()} for batch in data() for n in range(5)]
    loader = DataLoader(samples, batch_size=5)  # type: ignore[arg-type]
    trainer(CrossAttentionCalibration(tmp_path / "p.json", keep=0.25), devices=1).predict(Generating(), loader)
    assert (tmp_path / "p.json").read_bytes() == undisturbed
    assert torch.equal(torch.stack([s["pixel_values"] for s in samples[:5]]), data()[0]["pixel_values"])


def test_an_own_module_is_told_at_its_first_batch_what_its_step_must_return(tmp_path: Path) -> None:
    steps: list[Any] = []
    run = trainer(AnswerWriter(str(tmp_path / "answers.jsonl")), devices=1)
    with pytest.raises(TypeError, match=r"needs Returning\.predict_step to return a list of"):
        run.predict(Returning(steps.append), DataLoader(torch.arange(40), batch_size=2))
    assert len(steps) == 1 and not list(tmp_path.iterdir())
