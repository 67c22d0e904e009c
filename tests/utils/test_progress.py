"""Lines where no bar can be drawn: what a command tells whoever waits."""

import io
import re
import sys
import time

import pytest

from catp_lightning.utils import progress
from catp_lightning.utils.progress import Lines, Pace, duration, shows_bars


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


def test_lines_tell_the_stage_of_what_is_being_done() -> None:
    stream, stages = io.StringIO(), ["", "probing, batch 2 of 8"]
    with Lines("draw 2, calibrating", stream) as lines:
        lines.more = lambda: stages[-1]
        time.sleep(0.2)
        stages.append("")
        time.sleep(0.2)
        lines.more = None
    said = stream.getvalue().splitlines()
    assert re.fullmatch(r"catp: draw 2, calibrating: probing, batch 2 of 8, \d+ s", said[0])
    assert re.fullmatch(r"catp: draw 2, calibrating, \d+ s", said[-1])


def test_the_time_left_is_that_of_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    pace, told = Pace(), []
    for stage, done in (("probe", 0), ("probe", 1), ("probe", 3), ("fit", 5), ("fit", 6)):
        told.append(pace.left(stage, done, [4, 4]))
        now[0] += 10
    assert told == ["", ", about 70 s left", ", about 34 s left", "", ", about 20 s left"]
    assert pace.left("fit", 7, [float("inf")]) == "", "a loader without a length"
    assert duration(119.1) == "2 min" and duration(7200) == "2 h 0 min"


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
