"""Real processes for tests: they end in time or are killed, and their output is returned."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.support.paths import ROOT


@dataclass(frozen=True)
class Ended:
    """Outcome of a process.

    Attributes:
        code: its exit code; None: it was killed here, because its time was over.
        said: its standard output and standard error.
        left: True if processes that it had started were still running ten seconds later; they were killed.
    """

    code: int | None
    said: str
    left: bool


def environment(**more: str) -> dict[str, str]:
    """Return the environment for another Python that imports this project, with `more` in addition."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def finished(*arguments: object, seconds: float = 900) -> "subprocess.CompletedProcess[str]":
    """Run Python with these arguments at the root of the project; it must end without an error."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def in_fork(*works: Callable[[], object], seconds: float = 900) -> list[Ended]:
    """Run each of `works` in a process of its own, forked, so that nothing is imported again; all at the same time."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, str(number)) for number in range(len(works))]
        processes = [context.Process(target=_work, args=pair) for pair in zip(works, said, strict=True)]
        for process in processes:
            process.start()
        until = time.monotonic() + seconds
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
        ended = [_ended(one.pid or 0, one.exitcode, file) for one, file in zip(processes, said, strict=True)]
        for process in processes:
            process.join()
        return ended


def in_program(*commands: tuple[Sequence[str], Mapping[str, str]], seconds: float = 900) -> list[Ended]:
    """Run Python with each command line and environment in addition to this one's; all at the same time."""
    with tempfile.TemporaryDirectory() as folder:
        said, processes = [Path(folder, str(number)) for number in range(len(commands))], []
        for (arguments, more), file in zip(commands, said, strict=True):
            with open(file, "wb") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *arguments],
                        cwd=ROOT,
                        env=environment(**more),
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL,
                        start_new_session=True,
                    )
                )
        until, codes = time.monotonic() + seconds, []
        for process in processes:
            try:
                codes.append(process.wait(max(0.0, until - time.monotonic())))
            except subprocess.TimeoutExpired:
                codes.append(None)
        ended = [_ended(one.pid, code, file) for one, code, file in zip(processes, codes, said, strict=True)]
        for process in processes:
            process.wait()
        return ended


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def two_nodes(work: Callable[[int], object]) -> list[Callable[[], object]]:
    """Return functions that call `work` as node 0 and 1, of one process each, with the variables of a cluster set."""
    port = free_port()

    def on(node: int) -> None:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, NODE_RANK=str(node))
        work(node)

    return [partial(on, 0), partial(on, 1)]


def ranks(work: Callable[[int], object], count: int) -> list[Callable[[], object]]:
    """Return functions that call `work` as each rank of `count` processes, with the variables that a launcher sets."""
    port = free_port()

    def of(rank: int) -> None:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, LOCAL_RANK=str(rank))
        work(rank)

    return [partial(of, rank) for rank in range(count)]


def _work(work: Callable[[], object], said: Path) -> None:
    os.setsid()  # processes that it starts join its group
    file = open(said, "w", buffering=1)  # noqa: SIM115  # until the process ends
    for stream in (1, 2):
        os.dup2(file.fileno(), stream)
    sys.stdout = sys.stderr = file
    try:
        work()
    except BaseException:
        traceback.print_exc(file=file)
        file.flush()
        os._exit(1)


def _ended(group: int, code: int | None, said: Path) -> Ended:
    until = time.monotonic() + (10 if code is not None else 0)
    while left := _running(group):
        if time.monotonic() >= until:
            os.killpg(group, signal.SIGKILL)
            break
        time.sleep(0.05)
    return Ended(code, said.read_text(encoding="utf-8", errors="replace"), left)


def _running(group: int) -> bool:
    """True if a process of this group runs; one that has ended and was not waited for (a zombie) does not."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = file.read_text(errors="replace").rpartition(")")[2].split()[:3]
        except OSError:  # it has ended meanwhile
            continue
        if int(its_group) == group and state not in "ZX":
            return True
    return False
