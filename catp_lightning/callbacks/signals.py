"""SIGTERM and SIGINT end a loop at once: work done is saved on the way out, and the exit code names the signal."""

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
"""Seconds that the processes started by this one have to save their work."""


class _Ending:
    """Handler of both signals, for all callbacks of a trainer: raises SystemExit wherever the main thread is.

    A scheduler sends SIGTERM some seconds before it kills; Lightning's own handler only records it, and its predict
    loop never checks. Code may be interrupted at any point, so that only sums as of the last whole batch may be saved.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.process, self.users = trainer, os.getpid(), 0
        self.before: dict[int, Any] = {}
        self.received: signal.Signals | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            _as_by_default(number, frame)
        elif self.received is None:  # a second signal would interrupt the saving
            self.received = signal.Signals(number)
            self._tell(number, frame)
            if not _in_handler(frame):
                self.check()

    def check(self) -> None:
        """Raise SystemExit if a signal has come whose SystemExit could not be raised at once, or was swallowed."""
        if self.received is not None:
            raise SystemExit(128 + self.received)

    def _tell(self, number: int, frame: FrameType | None) -> None:
        """Pass the signal on to the processes that Lightning started, to its own handler and to the user's."""
        before = self.before[number]
        for process in _started(self.trainer):
            with suppress(OSError):
                process.send_signal(number)
        if number == signal.SIGINT:  # the previous handler is Python's own, which raises
            return
        if self.trainer.world_size == 1:
            before(number, frame)
            return
        for handler in getattr(before, "signal_handlers", [before]):  # Lightning's own waits for other processes
            if callable(handler) and type(getattr(handler, "__self__", None)).__name__ != "_SignalConnector":
                handler(number, frame)

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.getsignal(number)
            if number == signal.SIGINT and before is not signal.default_int_handler:
                continue  # another handler than Python's own is left in place
            if not callable(before) or signal.SIG_IGN in getattr(before, "signal_handlers", []):
                continue  # ignored; or SIGTERM has no handler here: Lightning did not install its own
            self.before[number] = before
            signal.signal(number, self)

    def restore(self) -> None:
        for number, before in self.before.items():
            if signal.getsignal(number) is self:
                signal.signal(number, before)
        if self.received is not None:
            self._wait()

    def _wait(self) -> None:
        """Wait for the other processes of this machine to save, so that the same command can be run again at once."""
        until = time.monotonic() + WAIT
        for process in (started := _started(self.trainer)):
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
        started.clear()  # otherwise Lightning kills this process because one of them ended by a signal


@contextmanager
def ended_by_signals(trainer: Trainer) -> Iterator[None]:
    """Context in which SIGTERM and SIGINT raise SystemExit, with code 143 and 130, in the main thread.

    No handler is installed outside the main thread, for a signal that is ignored, or for SIGINT if it has another
    handler than Python's own. The user's own handler of SIGTERM is called first. At the end the previous handlers are
    restored.
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
    """Print a line to standard error, for the person who ended the run; does nothing if that fails."""
    with suppress(OSError, ValueError):  # nobody reads standard error any more, or the disk of a log is full
        print(file=sys.stderr)  # a progress bar leaves its line open
        print(one_line(f"catp: {line}"), file=sys.stderr, flush=True)


def ended_by(error: BaseException) -> str:
    """Name of what ended a run: the signal, or the class of the error.

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
    """Processes that Lightning started by running the program again: Lightning's own list, not a copy."""
    processes: list[Any] = getattr(trainer.strategy.launcher, "procs", [])
    return processes if all(isinstance(process, subprocess.Popen) for process in processes) else []


def _as_by_default(number: int, frame: FrameType | None) -> None:
    """Handle a signal in a forked child that inherited the handler, such as a loader's worker, by Python's default."""
    if number == signal.SIGINT:
        signal.default_int_handler(number, frame)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _in_handler(frame: FrameType | None) -> bool:
    """True if another signal handler is running at `frame`: one that requeues the job must not be interrupted."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = {_code(handler) for handler in handlers if not isinstance(handler, _Ending)} - {None}
    while frame is not None:
        if frame.f_code in codes:
            return True
        frame = frame.f_back
    return False


def _code(handler: Any) -> CodeType | None:
    """Code object of a function, of a method or of a callable object's `__call__`; None if it has none."""
    called = handler if hasattr(handler, "__code__") else getattr(type(handler), "__call__", None)  # noqa: B004
    return getattr(called, "__code__", None)
