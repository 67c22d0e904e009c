"""Progress lines where there is no terminal to draw a bar on: from time to time a line says how far the work is."""

import os
import sys
import threading
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self, TextIO

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


class Lines:
    """Context that writes what is being done as a line every `EVERY` seconds; nothing where a bar can be drawn.

    A thread writes the lines, so that they come in the middle of a long step as well, an import or the loading of
    weights.

    Args:
        now: what is being done.
        stream: stream that the lines go to; None: standard error.

    Attributes:
        now: what is being done; the code that does the work sets it anew.
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
