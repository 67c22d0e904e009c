"""Lines where no bar can be drawn, and threads: what a command does for whoever waits, and for its neighbours."""

import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from catp_lightning.utils import progress
from catp_lightning.utils.progress import Lines, shows_bars
from catp_lightning.utils.threads import at_most, processors
from tests.support.paths import ROOT


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.02)
    monkeypatch.setenv("TERM", "xterm")


def test_lines_say_what_is_being_done_in_the_middle_of_a_step() -> None:
    stream = io.StringIO()
    with Lines("reading", stream) as lines:
        time.sleep(0.2)
        lines.now = "writing"
        time.sleep(0.2)
    before, said = threads(), stream.getvalue()
    time.sleep(0.1)
    assert stream.getvalue() == said and "catp-lines" not in before, "nothing goes on afterwards"
    assert all(re.fullmatch(r"catp: (reading|writing), \d+ s", line) for line in said.splitlines())
    assert said.index("reading") < said.index("writing")


def threads() -> list[str]:
    import threading

    return [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(
    ("out", "err", "term", "told"),
    [
        (Terminal, Terminal, "xterm", False),
        (Terminal, Terminal, "dumb", True),
        (io.StringIO, Terminal, "xterm", True),
        (Terminal, io.StringIO, "xterm", True),
        (io.StringIO, io.StringIO, "xterm", True),
    ],
)
def test_lines_are_written_where_no_bar_can_be_drawn(monkeypatch, out, err, term, told) -> None:
    stream = err()
    monkeypatch.setattr(sys, "stdout", out())
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", term)
    assert shows_bars() != told
    with Lines("reading"):
        time.sleep(0.15)
    assert ("catp: reading, 0 s\n" in stream.getvalue()) == told


def test_work_goes_on_where_nobody_reads_the_lines() -> None:
    closed = Closed()
    with Lines("reading", closed):
        time.sleep(0.1)
    closed = io.StringIO()
    with Lines("reading", closed):
        closed.close()
        time.sleep(0.1)


def test_making_an_environment_says_that_it_goes_on_until_it_has_failed() -> None:
    rule = "probe: ; @$(call TELLING,sleep 1.5; exit 3,the probe)"
    made = subprocess.run(
        ["make", "-s", "-C", str(ROOT), "EVERY=0.5", "--eval", rule, "probe"],
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert made.returncode != 0
    assert made.stdout.count("still at it: the probe\n") >= 1
    # Every end of the pipe is closed when make has ended, or this would have waited for the last `sleep`.
    assert "Error 3" in made.stderr


def groups(folder: Path, **limits: str) -> tuple[Path, Path]:
    """Control groups with limits, and the file that names the group of this process."""
    for path, limit in limits.items():
        place = folder.joinpath("tree", *path.strip("_").split("_")) if path != "_" else folder / "tree"
        place.mkdir(parents=True, exist_ok=True)
        (place / "cpu.max").write_text(limit + "\n")
    (folder / "own").write_text("1:name=other:/elsewhere\n0::/job/part\n")
    return folder / "tree", folder / "own"


@pytest.mark.parametrize(
    ("limits", "found"),
    [
        ({}, 8),
        ({"_": "max 100000"}, 8),
        ({"_": "150000 100000"}, 2),
        ({"_": "10000 100000"}, 1),
        ({"job": "300000 100000", "job_part": "max 100000"}, 3),
        ({"job": "max 100000", "job_part": "400000 100000"}, 4),
        ({"_": "3200000 100000"}, 8),
        ({"_": "nonsense"}, 8),
    ],
)
def test_processors_are_those_that_affinity_and_quota_give(tmp_path, monkeypatch, limits, found) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert processors(*groups(tmp_path, **limits)) == found


def test_threads_are_lowered_for_a_while_unless_the_user_names_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        with at_most(2):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 3
        with at_most(5):
            assert torch.get_num_threads() == 3
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        with at_most(1):
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_threads_of_the_command_sleep_while_they_wait_for_each_other() -> None:
    code = "import os; from catp_lightning.cli.main import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "print(os.environ['OMP_WAIT_POLICY'], 'torch' in __import__('sys').modules)"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for given, found in ({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"):
        done = subprocess.run(
            [sys.executable, "-c", code, "scenes", "--questions", "0"],
            env={**environment, **given}, capture_output=True, text=True, check=True, timeout=900,
        )  # fmt: skip
        assert done.stdout.splitlines()[-1] == f"{found} False"
