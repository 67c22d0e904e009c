"""Processes that are killed in a calibration: a server forks a child, or one for each rank, for every run."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from catp_lightning.calibration.checkpoint import CalibrationCheckpoint
from catp_lightning.calibration.replay.base import Replay
from catp_lightning.calibration.search.race import Race
from tests.support.interrupted_calibrations import calibrate, small, sorted_batches
from tests.support.paths import ROOT
from tests.support.processes import environment
from tests.support.trainers import Stream


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
        callback = calibrate(
            folder / "p.json", batches=Stream([] if rank else sorted_batches()) if uneven else sorted_batches(), **more
        )
    note(f"found {hashlib.sha256(repr(callback.policies).encode()).hexdigest()}")


class Server:
    def __init__(self) -> None:
        command = [sys.executable, "-c", "from tests.support.killed_calibrations import serve; serve()"]
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


def first(log: list[str], beginning: str) -> int:
    """The first line, from 1, with this beginning."""
    return next(n for n, line in enumerate(log, 1) if line.startswith(beginning))
