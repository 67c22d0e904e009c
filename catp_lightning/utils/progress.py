"""Progress lines where there is no terminal to draw a bar on: from time to time a line says how far the work is."""

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self, TextIO, cast

from catp_lightning.safe_text import one_line

EVERY = 10.0
"""Seconds between two progress lines."""


def shows_bars() -> bool:
    """True if progress bars can be drawn: in a notebook, or where both standard streams are a terminal that can move
    its cursor.

    Lightning's bar goes to standard output, tqdm's to standard error, and a pipe shows neither.
    """
    streams = (sys.stdout, sys.stderr)
    notebook = any(type(stream).__module__.startswith("ipykernel.") for stream in streams)
    terminal = all(stream is not None and stream.isatty() for stream in streams)
    return notebook or (terminal and os.environ.get("TERM") != "dumb")


def batch_of(number: int, counts: Iterable[int | float]) -> str:
    """Return the text for batch `number` of all batches that the `counts` of several loaders sum up to.

    >>> batch_of(3, [4, 4]), batch_of(3, [float("inf")])  # infinite: a loader without a length
    ('batch 3 of 8', 'batch 3')
    """
    total = sum(counts)
    return f"batch {number}" if total == float("inf") else f"batch {number} of {total}"


class Pace:
    """How long a stage of equal pieces of work will still take, as text for a progress line."""

    def __init__(self) -> None:
        self._stage, self._first, self._started = "", 0, 0.0

    def left(self, stage: str, done: int, counts: Iterable[int | float]) -> str:
        """Return ", about 3 min left", or nothing while that is not known.

        Args:
            stage: name of the stage; the time begins with its first call.
            done: number of pieces that are done.
            counts: numbers of pieces, whose sum is that of all; infinite where it is not known.
        """
        now, total = time.monotonic(), sum(counts)
        if stage != self._stage:
            self._stage, self._first, self._started = stage, done, now
        own = done - self._first
        if own <= 0 or total == float("inf"):
            return ""
        return f", about {duration((now - self._started) / own * (total - done))} left"


def duration(seconds: float) -> str:
    """Return a time in words, to two digits or so.

    >>> duration(3.2), duration(95), duration(1800), duration(8000)
    ('4 s', '95 s', '30 min', '2 h 14 min')
    """
    whole = math.ceil(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes = math.ceil(whole / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


class Lines:
    """Context that writes what is being done as a line every `EVERY` seconds; nothing where a bar can be drawn.

    A thread writes the lines, so that they come in the middle of a long step as well, an import or the loading of
    weights.

    Args:
        now: what is being done.
        stream: stream that the lines go to; None: standard error.

    Attributes:
        now: what is being done; the code that does the work sets it anew.
        more: function that says more about it, such as the stage that it has come to; None: there is no more to say.
    """

    def __init__(self, now: str, stream: TextIO | None = None) -> None:
        self.now, self.more = now, cast(Callable[[], str] | None, None)
        self._stream = sys.stderr if stream is None else stream  # None again where a process has none
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def _write(self) -> None:
        started = time.monotonic()
        while not self._ended.wait(EVERY):
            try:
                said = ": ".join(part for part in (self.now, self.more and self.more()) if part)
                line = one_line(f"catp: {said}, {time.monotonic() - started:.0f} s")
                print(line, file=self._stream, flush=True)
            except (OSError, ValueError):  # nobody reads any more, which is no reason to end the work
                return

    def __enter__(self) -> Self:
        if self._stream is not None and not shows_bars():
            self._thread = threading.Thread(target=self._write, name="catp-lines", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the progress lines; calling it again does nothing."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()


class Preparation:
    """Phase of a command before its work: progress lines are written, and a refused value counts as wrong usage.

    Attributes:
        lines: progress lines of the preparation.
        over: True once the work has begun; errors from then on are not wrong usage.
    """

    def __init__(self, lines: Lines) -> None:
        self.lines, self.over = lines, False

    def end(self) -> None:
        """End the preparation and its lines: the work begins, which reports its own progress."""
        self.over = True
        self.lines.close()
