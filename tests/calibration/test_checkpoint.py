"""A calibration that was interrupted, by SIGKILL too, ends where an undisturbed one ends and does nothing twice."""

import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torchmetrics import Metric

from catp_lightning import PolicyError
from catp_lightning.calibration import checkpoint as resume
from catp_lightning.calibration.checkpoint import CalibrationCheckpoint
from catp_lightning.calibration.fit.sums import DrawnQuestions, ImageSet, PartCounts, ProbeSums
from catp_lightning.calibration.identity import model_fingerprint
from catp_lightning.calibration.replay.base import Replay
from catp_lightning.calibration.search.race import Race
from catp_lightning.callbacks import calibration
from tests.support.fuzzing import Runs
from tests.support.interrupted_calibrations import PARTIAL, Breaking, calibrate, data, read, small
from tests.support.models import faint_blip2, greedily
from tests.support.modules import Generating
from tests.support.paths import ROOT
from tests.support.processes import environment
from tests.support.trainers import Stream

# Processes that are killed. A server has imported everything and forks a child, or one for each rank, for every run.


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(_run(**job)), file=answers, flush=True)


def _run(folder: str, kills: list[int | None], uneven: bool) -> list[int]:
    """Exit statuses of the ranks; 1000 for one that had to be stopped because it hung."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank, kill in enumerate(kills):
        child = os.fork()
        if not child:
            try:
                _work(Path(folder), rank, len(kills), port, kill, uneven)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    found: dict[int, int] = {}
    end = time.monotonic() + 900
    while len(found) < len(children):
        for child in set(children) - set(found):
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                found[child] = 1000
            else:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    found[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return [found[child] for child in children]


def _work(folder: Path, rank: int, ranks: int, port: int, kill: int | None, uneven: bool) -> None:
    """A calibration that notes what it does, line by line, and kills itself at a line."""
    small(setattr)
    lines = open(folder / f"log-{rank}", "w")  # noqa: SIM115
    noted = 0

    def note(line: str) -> None:
        nonlocal noted
        print(line, file=lines, flush=True)
        noted += 1
        if noted == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def noting(real: Callable[..., Any], before: Callable[..., str], after: Callable[..., str] | None = None) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            note(before(*args))
            found = real(*args, **kwargs)
            if after is not None:
                note(after(*args))
            return found

        return call

    def asked(replay: Replay) -> int:
        return int(replay.questions.sum())

    Replay.answer_log_probability = noting(  # type: ignore[method-assign]
        Replay.answer_log_probability, lambda replay, keep: f"probe {asked(replay)}"
    )
    Race.compare = noting(  # type: ignore[method-assign]
        Race.compare, lambda stage, samples: f"compare in {stage.title.split(' of ')[0]} {asked(samples.replay)}"
    )
    os.replace = noting(
        os.replace, lambda _, to: f"replaces {Path(to).name}", lambda _, to: f"replaced {Path(to).name}"
    )
    CalibrationCheckpoint.delete = noting(CalibrationCheckpoint.delete, lambda _: "deletes", lambda _: "deleted")  # type: ignore[method-assign]
    more: dict[str, Any] = {}
    if ranks > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
        os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        more = {"strategy": "ddp", "devices": ranks}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*before the ``update`` method")
        callback = calibrate(folder / "p.json", batches=Stream([] if rank else data()) if uneven else data(), **more)
    note(f"found {hashlib.sha256(repr(callback.policies).encode()).hexdigest()}")


class Server:
    def __init__(self) -> None:
        command = [sys.executable, "-c", "from tests.calibration.test_checkpoint import serve; serve()"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def run(self, folder: Path, *kills: int | None, uneven: bool = False) -> list[list[str]]:
        """Calibrate in a process for each of `kills`, the line at which it kills itself: what each noted."""
        assert self.process.stdin is not None and self.process.stdout is not None
        folder.mkdir(parents=True, exist_ok=True)
        job = {"folder": str(folder), "kills": kills, "uneven": uneven}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        statuses = json.loads(self.process.stdout.readline())
        for status, kill in zip(statuses, kills, strict=True):
            # One that waits for another in vain gives up.
            assert status == -signal.SIGKILL if kill else status in (0, 1 if any(kills) else 0)
        return [(folder / f"log-{rank}").read_text().splitlines() for rank in range(len(kills))]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.process.stdin.close()  # type: ignore[union-attr]
    assert started.process.wait(60) == 0


@pytest.fixture(scope="module")
def undisturbed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Its folder, and what it noted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, server.run(folder, None)[0]


def position(log: list[str]) -> int:
    """How many lines there are up to the last saving."""
    return max((n for n, line in enumerate(log, 1) if line.startswith("replaced p.json.partial")), default=0)


def same_result(folder: Path, other: Path) -> None:
    """The same policy to the byte, and no partial file, or half of one, beside it."""
    assert (folder / "p.json").read_bytes() == (other / "p.json").read_bytes()
    assert not list(folder.glob("*partial*")) + list(folder.glob(".*partial*"))


def killed_and_started_again(server: Server, folder: Path, line: int, undisturbed: tuple[Path, list[str]]) -> None:
    """All that is done again is what was not saved; that includes every probe and every comparison."""
    expected, log = undisturbed
    assert server.run(folder, line)[0] == log[:line]
    assert server.run(folder, None)[0] == log[position(log[:line]) :]
    same_result(folder, expected)


MOMENTS = {
    "while probing": ("probe", 4),
    "in the middle of writing what was probed": ("replaces p.json.partial", 2),
    "in the second round": ("compare in round 2", 2),
    "while checking": ("compare in checking", 2),
    "when the policy is written": ("deletes", 1),
}


@pytest.mark.parametrize(
    "moment",
    [
        moment if moment == "in the middle of writing what was probed" else pytest.param(moment, marks=pytest.mark.slow)
        for moment in MOMENTS
    ],
)
def test_a_killed_calibration_ends_in_the_same_policy_and_repeats_nothing(
    server: Server, undisturbed: tuple[Path, list[str]], tmp_path: Path, moment: str
) -> None:
    beginning, nth = MOMENTS[moment]
    lines = [n for n, line in enumerate(undisturbed[1], 1) if line.startswith(beginning)]
    killed_and_started_again(server, tmp_path, lines[nth - 1], undisturbed)


@pytest.mark.slow
def test_killed_at_every_single_moment(server: Server, undisturbed: tuple[Path, list[str]], tmp_path: Path) -> None:
    for line in range(1, first(undisturbed[1], "deletes") + 1):
        killed_and_started_again(server, tmp_path / str(line), line, undisturbed)


@pytest.mark.slow
def test_killed_after_every_saving_it_needs_no_other_run_than_the_last(
    server: Server, undisturbed: tuple[Path, list[str]], tmp_path: Path
) -> None:
    expected, log = undisturbed
    done = 0
    for line in (n for n, line in enumerate(log, 1) if line.startswith("replaced p.json.partial")):
        assert server.run(tmp_path, line - done)[0] == log[done:line]
        done = line
    assert server.run(tmp_path, None)[0] == log[done:]
    same_result(tmp_path, expected)


def first(log: list[str], beginning: str) -> int:
    """The first line, from 1, with this beginning."""
    return next(n for n, line in enumerate(log, 1) if line.startswith(beginning))


@pytest.fixture(scope="module")
def two(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """Two processes that nothing disturbs."""
    folder = tmp_path_factory.mktemp("two")
    return folder, server.run(folder, None, None)


def test_two_processes_killed_in_a_round_each_go_on_where_they_were(
    server: Server, two: tuple[Path, list[list[str]]], tmp_path: Path
) -> None:
    """The first has saved nothing of the round, the second all of it."""
    expected, logs = two
    kills = [first(logs[0], "compare in round 1"), first(logs[1], "compare in round 2") - 1]
    assert position(logs[1][: kills[1]]) == kills[1] > first(logs[1], "compare in round 1")
    assert server.run(tmp_path, *kills) == [log[:line] for log, line in zip(logs, kills, strict=True)]
    with pytest.raises(PolicyError, match="process was 0 of 2, is 0 of 1"):
        calibrate(tmp_path / "p.json")
    assert server.run(tmp_path, None, None) == [
        log[position(log[:line]) :] for log, line in zip(logs, kills, strict=True)
    ]
    same_result(tmp_path, expected)


@pytest.mark.slow
def test_a_process_killed_when_the_other_had_finished_goes_on_while_that_one_starts_anew(
    server: Server, two: tuple[Path, list[list[str]]], tmp_path: Path
) -> None:
    expected, logs = two
    line = first(logs[1], "deletes")
    server.run(tmp_path, None, line)
    assert [file.name for file in tmp_path.glob("*partial*")] == ["p.json.partial-1.safetensors"]
    (tmp_path / "p.json").unlink()
    assert server.run(tmp_path, None, None) == [logs[0], logs[1][position(logs[1][:line]) :]]
    same_result(tmp_path, expected)


@pytest.mark.slow
def test_a_process_without_a_batch_takes_part_before_and_after(
    server: Server, undisturbed: tuple[Path, list[str]], tmp_path: Path
) -> None:
    expected, log = undisturbed
    line = first(log, "compare in round 2")
    assert server.run(tmp_path, line, None, uneven=True)[0] == log[:line]
    assert server.run(tmp_path, None, None, uneven=True) == [
        log[position(log[:line]) :],
        ["deletes", "deleted", log[-1]],
    ]
    same_result(tmp_path, expected)


# What is refused. The calibration that is gone on with was interrupted by an exception, with four batches saved.


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch.setattr)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="planted"):
        small(patch.setattr)
        calibrate(folder / "p.json", Breaking())
    return folder


@pytest.fixture
def path(interrupted: Path, tmp_path: Path) -> Path:
    shutil.copy(interrupted / PARTIAL, tmp_path)
    return tmp_path / "p.json"


def test_a_calibration_interrupted_by_an_exception_goes_on(
    undisturbed: tuple[Path, list[str]], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = undisturbed[1]
    probed: list[int] = []
    real = Replay.answer_log_probability
    monkeypatch.setattr(Replay, "answer_log_probability", lambda *args: probed.append(0) or real(*args))
    calibrate(path)
    same_result(path.parent, undisturbed[0])
    at = [n for n, line in enumerate(log) if line.startswith("replaced")][1]  # four batches were saved
    assert len(probed) == sum(line.startswith("probe") for line in log[at:]) > 0


def changed_weight() -> Generating:
    module = Generating()
    weight = module.net.language_model.model.decoder.layers[1].fc1.weight
    weight.data[17, 5] = torch.nextafter(weight[17, 5], torch.tensor(9.0))
    return module


def changed_image() -> list[dict[str, Tensor]]:
    batches = data()
    batches[2]["pixel_values"][3, 0, 0, 0] += 1e-3
    return batches


def changed_text() -> list[dict[str, Tensor]]:
    batches = data()
    batches[2]["input_ids"][3, -1] += 1
    return batches


def changed_order() -> list[dict[str, Tensor]]:
    batches = data()
    return [batches[0], batches[2], batches[1], *batches[3:]]


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "budget": (lambda: {"keep": 0.5}, r"keep was \['0.25'\], is \['0.5'\]"),
    "share or tokens": (lambda: {"keep": 1}, r"keep was \['0.25'\], is \['1'\]"),
    "promise": (lambda: {"keep": None, "promise": 0.1}, r"promise was None, is \[0.1, 0.95\]"),
    "one weight": (lambda: {"module": changed_weight()}, r"model was [0-9a-f]{16}, is [0-9a-f]{16}\."),
    "precision": (lambda: {"precision": "bf16-mixed"}, "precision was 32-true, is bf16-mixed"),
    "number of batches": (lambda: {"batches": data()[:3]}, r"batches was \['7'\], is \['3'\]"),
    "limit of batches": (lambda: {"limit_predict_batches": 5}, r"batches was \['7'\], is \['5'\]"),
    "image": (
        lambda: {"batches": changed_image()},
        "other data: batch 2 had fingerprint [0-9a-f]{16}, now [0-9a-f]{16}",
    ),
    "question": (lambda: {"batches": changed_text()}, "other data: batch 2 had fingerprint"),
    "order": (lambda: {"batches": changed_order()}, "batch 1 .* which was batch 2: the order changed"),
    "generation settings": (
        lambda: {"module": Generating(settings=greedily(2, 1))},
        "other answers: those to batch 0 had fingerprint",
    ),
}
SPENT = 5000.0


def test_the_cost_is_that_of_all_runs_whatever_the_clock_does(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = path.parent / PARTIAL
    metadata, tensors = read(file)
    assert 0 < float(metadata["seconds"]) < 600
    file.write_bytes(signed(tensors, **{**without(metadata), "seconds": repr(SPENT)}))
    told: list[float] = []
    monkeypatch.setattr(calibration, "report", lambda *given: told.extend(given[4:6]) or [])
    clock = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))  # set back again and again
    calibrate(path)
    seconds, plain = told
    assert 0 < plain < seconds - SPENT < 600


@pytest.mark.parametrize("seconds", ["-1594.0", "nan", "inf", "long"])
def test_a_partial_file_that_was_worked_on_for_no_possible_time_is_damaged(path: Path, seconds: str) -> None:
    file = path.parent / PARTIAL
    metadata, tensors = read(file)
    file.write_bytes(signed(tensors, **{**without(metadata), "seconds": seconds}))
    with pytest.raises(
        PolicyError, match=r"cannot be read as part of a calibration \(ValueError: (seconds is|could not)"
    ):
        calibrate(path)


@pytest.mark.parametrize("name", REFUSED)
def test_a_partial_file_of_another_calibration_is_refused_by_name(path: Path, name: str) -> None:
    what, message = REFUSED[name]
    before = (path.parent / PARTIAL).read_bytes()
    with pytest.raises(PolicyError, match=f"(?s){PARTIAL} is part of .*{message}.* delete the file to start anew"):
        calibrate(path, **what())
    assert [file.name for file in path.parent.iterdir()] == [PARTIAL]
    assert (path.parent / PARTIAL).read_bytes() == before


def test_fewer_batches_of_a_loader_without_a_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="planted"):
        calibrate(tmp_path / "p.json", Breaking(), Stream(data()))
    before = (tmp_path / PARTIAL).read_bytes()
    with pytest.raises(PolicyError, match=r"calibration with more data: at least 4 batches, now 3. Go on with"):
        calibrate(tmp_path / "p.json", batches=Stream(data()[:3]))
    assert (tmp_path / PARTIAL).read_bytes() == before


def test_data_that_changes_between_two_readings_is_refused(tmp_path: Path) -> None:
    class Drifting(Stream):
        readings = 0

        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            self.readings += 1
            return ({**batch, "pixel_values": batch["pixel_values"] * self.readings} for batch in self.items)

    with pytest.raises(PolicyError, match=r"changed between two readings: batch 0 .*switch shuffling and random aug"):
        calibrate(tmp_path / "new" / "p.json", batches=Drifting(data()))
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="planted"):
        calibrate(tmp_path / "p.json", Breaking(), Stream(data()))
    with pytest.raises(PolicyError, match=rf"changed between two readings.*, and delete .*{PARTIAL} to start anew"):
        calibrate(tmp_path / "p.json", batches=Drifting(data()))
    assert [file.name for file in tmp_path.iterdir()] == [PARTIAL], "hours of an older run are not thrown away"


def without(metadata: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key != "checksum"}


def signed(tensors: dict[str, Tensor], **metadata: str) -> bytes:
    """A partial file of anything, with the checksum that it should have."""
    return save(tensors, {**metadata, "checksum": resume._checksum(tensors, metadata)})


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "half": lambda content: content[: len(content) // 2],
    "all but a byte": lambda content: content[:-1],
    "text": lambda _: b"not a file of tensors",
    "a pickle": lambda _: pickle.dumps(Runs(Path("unpickled"))),
    "other tensors": lambda _: save({"weight": torch.ones(2)}),
    "other metadata": lambda _: signed({"data": torch.ones(2)}, settings="[1]", stages="{"),
    "one number for a batch": lambda _: signed({"data": torch.ones(2)}, settings="{}", stages="[]"),
    "sums of no stage": lambda _: signed(
        {"data": torch.ones(0, 2), "3/probes/gram": torch.ones(2)}, settings="{}", stages="[]"
    ),
    "no checksum": lambda _: save({"data": torch.ones(0, 2)}, {"settings": "{}", "stages": "[]"}),
    "a checksum of something else": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_and_nothing_in_it_is_run(
    path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    file = path.parent / PARTIAL
    damaged = DAMAGE[damage](file.read_bytes())
    file.write_bytes(damaged)
    with pytest.raises(
        PolicyError, match=f"{PARTIAL} cannot be read as part of a calibration .*Delete it to start anew"
    ):
        CalibrationCheckpoint(file, {})
    assert file.read_bytes() == damaged
    assert list(path.parent.iterdir()) == [file]


def test_every_bit_of_a_partial_file_is_checked(tmp_path: Path) -> None:
    """Of sums, fingerprints, settings, names, shapes and the checksum itself; and numbers that were put in by hand."""
    file, found = tmp_path / PARTIAL, metrics()
    partial = CalibrationCheckpoint(file, {"keep": ["0.5"]})
    partial.begin("first", found)
    update(found, 0)
    partial.add((1, 2), found)
    partial.finish(1, found)
    whole = file.read_bytes()
    CalibrationCheckpoint(file, {"keep": ["0.5"]})
    length, chooser = 8 + int.from_bytes(whole[:8], "little"), random.Random(0)
    bits = [*(8 * byte + chooser.randrange(8) for byte in range(0, len(whole), 3)), 8 * length + 7, 8 * len(whole) - 1]
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(PolicyError, match=r"cannot be read as part of a calibration .*Delete it to start anew"):
            CalibrationCheckpoint(file, {"keep": ["0.5"]})
    sums = load(whole)
    other = {**sums, "0/parts/counts": sums["0/parts/counts"] + 1}
    file.write_bytes(save(other, json.loads(whole[8:length])["__metadata__"]))
    with pytest.raises(PolicyError, match="its checksum is another: the file was damaged or changed"):
        CalibrationCheckpoint(file, {"keep": ["0.5"]})


def test_a_partial_file_that_is_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / PARTIAL)
    with pytest.raises(PolicyError, match=r"it is a named pipe, not a regular file.*Delete it"):
        CalibrationCheckpoint(tmp_path / PARTIAL, {})


def test_another_path_is_another_calibration(path: Path) -> None:
    with pytest.raises(RuntimeError, match="planted"):
        calibrate(path.parent / "other", Breaking())
    assert (path.parent / "other" / "policy.partial-0.safetensors").is_file()
    assert (path.parent / PARTIAL).is_file()


# Sums.


def metrics() -> dict[str, Metric]:
    return {"probes": ProbeSums(3, folds=2), "images": ImageSet(), "first": DrawnQuestions(2), "parts": PartCounts()}


def update(found: dict[str, Metric], number: int) -> None:
    draw = torch.Generator().manual_seed(number)
    images = torch.randint(-(2**63), 2**63 - 1, (4,), generator=draw)
    images[0] = 7  # met in every batch
    found["probes"].update(images % 2, torch.rand(5, 4, 3, generator=draw), torch.rand(5, 4, generator=draw))
    found["images"].update(images)
    found["first"].update(images, images.flip(0), torch.rand(2, 4, generator=draw) < 0.5)
    found["parts"].update(images % 2)


def states(found: dict[str, Metric]) -> list[Tensor]:
    values = [value for metric in found.values() for value in metric.metric_state.values()]
    return [torch.cat(value) if isinstance(value, list) else value for value in values]


@pytest.mark.parametrize("inference", [False, True])
def test_restored_sums_are_the_same_to_the_bit_and_go_on(tmp_path: Path, inference: bool) -> None:
    """In inference mode too, where Lightning reads the split."""
    with torch.inference_mode(inference):
        through, before = metrics(), metrics()
        partial = CalibrationCheckpoint(tmp_path / "sums", {"a": 1.5})
        assert partial.begin("probe", before) == 0
        for number in range(4):
            update(through, number)
            update(before, number)
            partial.add((number, 0), before)
    again = CalibrationCheckpoint(tmp_path / "sums", {"a": 1.5})
    with torch.inference_mode(inference):
        after = metrics()
        assert again.begin("probe", after) == 4
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(states(after), states(before), strict=True))
        update(through, 4)
        update(after, 4)
        assert all(map(torch.equal, states(after), states(through)))


def test_sums_for_another_task_are_forgotten_with_all_that_follow(tmp_path: Path) -> None:
    """Another process began anew and found something else: this one's rounds were for other candidates."""
    partial = CalibrationCheckpoint(tmp_path / "sums", {})
    for task in ("probe", "round 1", "round 2"):
        found = metrics()
        partial.begin(task, found)
        for number in range(2):
            update(found, number)
            partial.add((number, 0), found)
        partial.finish(2, found)
    again = CalibrationCheckpoint(tmp_path / "sums", {})
    assert [again.begin(task, metrics()) for task in ("probe", "round 1 of others", "round 2")] == [2, 0, 0]


def test_sums_of_another_shape_are_refused(tmp_path: Path) -> None:
    partial, found = CalibrationCheckpoint(tmp_path / "sums", {}), metrics()
    partial.begin("probe", found)
    update(found, 0)
    partial.add((0, 0), found)
    partial.finish(1, found)
    other = {**metrics(), "probes": ProbeSums(4, folds=2)}
    with pytest.raises(PolicyError, match=r"made by another version: its probes/gram is \(2, 6\)"):
        CalibrationCheckpoint(tmp_path / "sums", {}).begin("probe", other)


# The model's fingerprint.


def test_the_fingerprint_of_a_model_depends_on_every_single_weight() -> None:
    model = nn.Linear(101, 97)
    before, weight = model_fingerprint(model), model.weight.data.view(-1)
    for place in range(0, len(weight), 7):
        value = weight[place].clone()
        weight[place] = torch.nextafter(value, torch.tensor(9.0))
        assert model_fingerprint(model) != before, place
        weight[place] = value
    assert model_fingerprint(model) == before


def test_the_fingerprint_of_a_model_depends_on_names_shapes_dtypes_and_places() -> None:
    base = nn.Linear(4, 4, bias=False)
    named, shaped, turned = nn.Sequential(base), nn.Linear(2, 8, bias=False), nn.Linear(4, 4, bias=False)
    shaped.weight.data, turned.weight.data = base.weight.data.view(8, 2), base.weight.data.flip(0)
    half = nn.Linear(4, 4, bias=False).bfloat16()
    half.weight.data = base.weight.data.bfloat16()
    assert len({model_fingerprint(model) for model in (base, named, shaped, turned, half)}) == 5


def test_the_fingerprint_of_a_model_is_that_of_its_values(tmp_path: Path) -> None:
    """A copy has it, another layout in memory and tied weights; every dtype, empty and single values do."""
    model, copy = faint_blip2(), faint_blip2()
    assert model_fingerprint(copy) == model_fingerprint(model)
    copy.language_projection.weight.data = copy.language_projection.weight.data.T.contiguous().T
    assert model_fingerprint(copy) == model_fingerprint(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    odd = nn.Module()
    kinds = (torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.bool, torch.int64)
    for number, kind in enumerate(kinds):
        odd.register_buffer(f"b{number}", torch.tensor([0, 1, 1, 0]).to(kind))
    odd.register_buffer("empty", torch.empty(0, 3))
    odd.register_buffer("single", torch.tensor(2.5))
    before = model_fingerprint(odd)
    for number in range(len(kinds)):
        odd.get_buffer(f"b{number}")[3] = 1
    assert before != model_fingerprint(odd) == model_fingerprint(odd)
    assert model_fingerprint(nn.Linear(2, 2, device="meta")) != model_fingerprint(nn.Linear(2, 3, device="meta"))
