"""A process that is killed while it writes leaves every file old or new."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from catp_lightning import PolicyError, PruningPolicy
from catp_lightning.calibration.checkpoint import CalibrationCheckpoint
from catp_lightning.calibration.fit.sums import PartCounts
from tests.support.answer_files import many_answers
from tests.support.processes import Ended, in_fork
from tests.support.small_calibrations import contents

pytestmark = pytest.mark.usefixtures("saving_often")


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
    "answers": many_answers,
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
        assert PruningPolicy.load(tmp_path).evidence == {"long": [0] * 999}, "what was left is not a policy"
        assert PruningPolicy.load(tmp_path, keep=0.5).evidence == {"long": [0] * 999}
        (tmp_path / "keep-0.5.json").unlink()
        with pytest.raises(PolicyError, match="There is no policy"):
            PruningPolicy.load(tmp_path)


@pytest.mark.slow
def test_killed_at_any_moment_a_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    """A process writes two policies in turn, as fast as it can."""
    two = [PruningPolicy(evidence={"long": [n] * 9999}) for n in range(2)]

    def write() -> None:
        while True:
            for one in two:
                one.save(tmp_path)

    chance, left, kills = random.Random(0), 0, 0
    file = two[0].save(tmp_path)
    while kills < 10 or not left:
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
