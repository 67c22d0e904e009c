"""SIGTERM and SIGINT end a loop at once: what was done is saved on the way out, and the exit code tells."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import CodeType, FrameType
from typing import Any

from lightning.pytorch import Trainer

from catp_lightning.safe_text import one_line

WAIT = 5.0
"""Seconds that the processes this one started have to save what they did."""


class _Ending:
    """The handler of both signals, for all callbacks of a trainer: raises SystemExit where the main thread just is.

    A scheduler sends SIGTERM some seconds before it kills; Lightning's own handler only notes it, and its predict loop
    never asks. What a handler interrupts must not count on anything after it, so that sums are saved as they were after
    the last whole batch.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.process, self.users = trainer, os.getpid(), 0
        self.before: dict[int, Any] = {}
        self.received: signal.Signals | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            _as_by_default(number, frame)
        elif self.received is None:  # later ones would interrupt the saving
            self.received = signal.Signals(number)
            self._tell(number, frame)
            if not _in_handler(frame):
                self.check()

    def check(self) -> None:
        """Raise SystemExit if a signal came: where one could not be raised at once, or was swallowed."""
        if self.received is not None:
            raise SystemExit(128 + self.received)

    def _tell(self, number: int, frame: FrameType | None) -> None:
        """Everybody who would have heard: processes started by Lightning, its own handler, and the user's."""
        before = self.before[number]
        for process in _started(self.trainer):
            with suppress(OSError):
                process.send_signal(number)
        if number == signal.SIGINT:  # Python's own: it raises
            return
        if self.trainer.world_size == 1:
            before(number, frame)
            return
        for handler in getattr(before, "signal_handlers", [before]):  # Lightning's own waits there for other processes
            if callable(handler) and type(getattr(handler, "__self__", None)).__name__ != "_SignalConnector":
                handler(number, frame)

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.getsignal(number)
            if number == signal.SIGINT and before is not signal.default_int_handler:
                continue  # somebody else's, who wants something else
            if not callable(before) or signal.SIG_IGN in getattr(before, "signal_handlers", []):
                continue  # ignored; or, of SIGTERM, nothing is to be heard here: Lightning has not put its own
            self.before[number] = before
            signal.signal(number, self)

    def restore(self) -> None:
        for number, before in self.before.items():
            if signal.getsignal(number) is self:
                signal.signal(number, before)
        if self.received is not None:
            self._wait()

    def _wait(self) -> None:
        """Until the other processes of this machine have saved: the same command, given at once, finds nobody there."""
        until = time.monotonic() + WAIT
        for process in (started := _started(self.trainer)):
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
        started.clear()  # or Lightning kills this process, because one of those ended by a signal


@contextmanager
def ended_by_signals(trainer: Trainer) -> Iterator[None]:
    """While inside, SIGTERM and SIGINT raise SystemExit, with code 143 and 130, in the main thread.

    Nothing is installed in other threads, and where a signal is ignored; of SIGINT, where somebody else handles it. A
    handler that the user had for SIGTERM is called before. At the end the handlers are those of before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ending = _installed()
    if ending is None or ending.trainer is not trainer:
        ending = _Ending(trainer)
        ending.install()
    ending.users += 1
    try:
        yield
    finally:
        ending.users -= 1
        if not ending.users:
            ending.restore()


def end_if_told() -> None:
    """Raise SystemExit if a signal that should end the loop has come and has not ended it yet."""
    if (ending := _installed()) is not None:
        ending.check()


def tell(line: str) -> None:
    """A line for who ended the run, where errors go, if anybody is there."""
    with suppress(OSError, ValueError):  # nobody reads it any more, or the disk of a log is full
        print(file=sys.stderr)  # a progress bar leaves its line open
        print(one_line(f"catp: {line}"), file=sys.stderr, flush=True)


def ended_by(error: BaseException) -> str:
    """What ended a run, for people.

    >>> ended_by(SystemExit(143)), ended_by(KeyboardInterrupt()), ended_by(ValueError("x"))
    ('SIGTERM', 'SIGINT', 'ValueError')
    """
    if isinstance(error, KeyboardInterrupt):
        return "SIGINT"
    codes = {128 + number: number.name for number in (signal.SIGTERM, signal.SIGINT)}
    code = error.code if isinstance(error, SystemExit) else None
    return codes[code] if isinstance(code, int) and code in codes else type(error).__name__


def _installed() -> _Ending | None:
    for number in (signal.SIGTERM, signal.SIGINT):
        if isinstance(handler := signal.getsignal(number), _Ending):
            return handler
    return None


def _started(trainer: Trainer) -> list[subprocess.Popen[bytes]]:
    """The processes that Lightning started by running the program again: its list, which it looks after."""
    processes: list[Any] = getattr(trainer.strategy.launcher, "procs", [])
    return processes if all(isinstance(process, subprocess.Popen) for process in processes) else []


def _as_by_default(number: int, frame: FrameType | None) -> None:
    """In a child that was forked and inherited the handler, a loader's worker for example."""
    if number == signal.SIGINT:
        signal.default_int_handler(number, frame)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _in_handler(frame: FrameType | None) -> bool:
    """Whether another signal's handler is at work: one that requeues the job must not be interrupted."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = {_code(handler) for handler in handlers if not isinstance(handler, _Ending)} - {None}
    while frame is not None:
        if frame.f_code in codes:
            return True
        frame = frame.f_back
    return False


def _code(handler: Any) -> CodeType | None:
    """Of a function, a method, or an object that is called."""
    called = handler if hasattr(handler, "__code__") else getattr(type(handler), "__call__", None)  # noqa: B004
    return getattr(called, "__code__", None)
