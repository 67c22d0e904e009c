"""Where there is no terminal to draw a bar on, a line from time to time says that work goes on, and how far it is."""

import os
import sys
import threading
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self, TextIO

from catp_lightning.safe_text import one_line

EVERY = 10.0
"""Seconds between two lines."""


def shows_bars() -> bool:
    """Whether progress bars can be drawn: in a notebook, or where both standard streams are a terminal that can move
    its cursor. Lightning's bar goes to the one, tqdm's to the other, and what is piped shows neither."""
    streams = (sys.stdout, sys.stderr)
    notebook = any(type(stream).__module__.startswith("ipykernel.") for stream in streams)
    terminal = all(stream is not None and stream.isatty() for stream in streams)
    return notebook or (terminal and os.environ.get("TERM") != "dumb")


def batch_of(number: int, counts: Iterable[int | float]) -> str:
    """
    >>> batch_of(3, [4, 4]), batch_of(3, [float("inf")])  # infinite: a loader without a length
    ('batch 3 of 8', 'batch 3')
    """
    total = sum(counts)
    return f"batch {number}" if total == float("inf") else f"batch {number} of {total}"


class Lines:
    """While inside, what is being done is written as a line every few seconds; nothing where a bar can be drawn.

    A thread writes them, so that they come in the middle of a long step as well, an import or the loading of weights.

    Args:
        now: what is being done.
        stream: where the lines go; None: standard error.

    Attributes:
        now: the same; whoever does the work sets it anew.
    """

    def __init__(self, now: str, stream: TextIO | None = None) -> None:
        self.now = now
        self._stream = sys.stderr if stream is None else stream  # None again where a process has none
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def _write(self) -> None:
        started = time.monotonic()
        while not self._ended.wait(EVERY):
            try:
                line = one_line(f"catp: {self.now}, {time.monotonic() - started:.0f} s")
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
        """End the lines; more than once does nothing."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()


class Preparation:
    """What a command does before its work: lines say that it goes on, and a value that is refused is wrong usage.

    Attributes:
        lines: of the preparation.
        over: whether the work has begun; what fails from then on is no wrong usage.
    """

    def __init__(self, lines: Lines) -> None:
        self.lines, self.over = lines, False

    def end(self) -> None:
        """The work begins, and says by itself how far it is."""
        self.over = True
        self.lines.close()
