"""Processes that are killed in a calibration: one is forked for each rank of every run."""

import hashlib
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from catp_lightning.calibration.checkpoint import CalibrationCheckpoint
from catp_lightning.calibration.replay.base import Replay
from catp_lightning.calibration.search.race import Race
from tests.support.interrupted_calibrations import calibrate, small, sorted_batches
from tests.support.processes import in_fork, ranks
from tests.support.trainers import Stream


def _work(folder: Path, rank: int, count: int, kill: int | None, uneven: bool) -> None:
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
        Race.compare, lambda stage, samples, *_: f"compare in {stage.title.split(' of ')[0]} {asked(samples.replay)}"
    )
    os.replace = noting(
        os.replace, lambda _, to: f"replaces {Path(to).name}", lambda _, to: f"replaced {Path(to).name}"
    )
    CalibrationCheckpoint.delete = noting(CalibrationCheckpoint.delete, lambda _: "deletes", lambda _: "deleted")  # type: ignore[method-assign]
    more: dict[str, Any] = {}
    if count > 1:
        os.environ |= {"NODE_RANK": "0", "WORLD_SIZE": str(count)}
        more = {"strategy": "ddp", "devices": count}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*before the ``update`` method")
        callback = calibrate(
            folder / "p.json", batches=Stream([] if rank else sorted_batches()) if uneven else sorted_batches(), **more
        )
    note(f"found {hashlib.sha256(repr(callback.policies).encode()).hexdigest()}")


def run(folder: Path, *kills: int | None, uneven: bool = False) -> list[list[str]]:
    """Calibrate in a process for each of `kills`, the line at which it kills itself: what each noted."""
    folder.mkdir(parents=True, exist_ok=True)
    works = ranks(lambda rank: _work(folder, rank, len(kills), kills[rank], uneven), len(kills))
    for ended, kill in zip(in_fork(*works), kills, strict=True):
        # One that waits for another in vain gives up.
        assert ended.code == -signal.SIGKILL if kill else ended.code in (0, 1 if any(kills) else 0), ended.said[-4000:]
    return [(folder / f"log-{rank}").read_text().splitlines() for rank in range(len(kills))]


def position(log: list[str]) -> int:
    """How many lines there are up to the last saving."""
    return max((n for n, line in enumerate(log, 1) if line.startswith("replaced p.json.partial")), default=0)


def same_result(folder: Path, other: Path) -> None:
    """The same policy to the byte, and no partial file, or half of one, beside it."""
    assert (folder / "p.json").read_bytes() == (other / "p.json").read_bytes()
    assert not list(folder.glob("*partial*")) + list(folder.glob(".*partial*"))


def killed_and_started_again(folder: Path, line: int, undisturbed: tuple[Path, list[str]]) -> None:
    """All that is done again is what was not saved; that includes every probe and every comparison."""
    expected, log = undisturbed
    assert run(folder, line)[0] == log[:line]
    assert run(folder, None)[0] == log[position(log[:line]) :]
    same_result(folder, expected)


def first(log: list[str], beginning: str) -> int:
    """The first line, from 1, with this beginning."""
    return next(n for n, line in enumerate(log, 1) if line.startswith(beginning))
