"""Locks on paths that only one run at a time may write to; a lock ends with the process that holds it."""

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

PATIENCE = 8.0
"""Seconds to wait for the lock of a killed run: workers of its loaders hold it until they miss their parent, for which
they look every 5 seconds."""


@contextmanager
def only_run(path: Path, rank: int, refused: type[Exception]) -> Iterator[None]:
    """Context in which this run alone writes to `path`, by a lock of the system, which ends with the process.

    The lock is held on a file of its own beside `path`, `.<name>.<rank>.lock`, because a file that is replaced would
    lose its lock; the lock file also says who holds it. At the end it is removed, and with it the folders that were
    made for it, where they are empty. Where the file system knows no locks, nothing is locked.

    Args:
        path: path that the run writes; its folder is made where it does not exist.
        rank: rank of this process in the run.
        refused: type of the error.

    Raises:
        refused: another run is writing there. Its process and its machine are named.
    """
    place, folder = path.with_name(f".{path.name}.{rank}.lock"), path.absolute().parent
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    lock = FileLock(place)
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _acquire(lock, place)
        except Timeout:
            raise refused(_alive(path, place)) from None
        except (OSError, NotImplementedError):
            pass  # no locks, as on some network file systems, or nothing can be written, which raises when it is tried
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):
                place.unlink()  # while it is held: a process that waits for it finds the file gone, and starts over
            lock.release()
        for parent in made:
            with suppress(OSError):  # the folder is not empty
                parent.rmdir()


def refuse_running(path: Path, refused: type[Exception]) -> None:
    """Raise `refused` where a run, in however many processes, is writing to `path`; locks of dead runs are removed.

    Args:
        path: path that a run may write; it need not exist.
        refused: type of the error.
    """
    name = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.lock")
    for place in path.parent.glob(".*.lock"):
        if found := name.fullmatch(place.name):
            with only_run(path, int(found[1]), refused):
                pass


def _acquire(lock: FileLock, place: Path) -> None:
    """Take the lock and write down its owner; raise Timeout if a process that is alive holds it."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not _is_dead(_owner(place)):
            raise
        lock.acquire(timeout=PATIENCE)  # its children hold what they inherited until they end
    if type(lock) is FileLock:  # without locks of the file system it turns into a class that itself writes there
        with suppress(OSError):
            place.write_text(f"{os.getpid()}\n{socket.gethostname()}\n", encoding="utf-8")


def _owner(place: Path) -> tuple[int, str] | None:
    """Return the id of the process that holds a lock, and its machine; None if they are not written down."""
    with suppress(OSError, ValueError):
        process, machine = place.read_text(encoding="utf-8").splitlines()[:2]
        return int(process), machine
    return None


def _is_dead(owner: tuple[int, str] | None) -> bool:
    if owner is None or owner[1] != socket.gethostname():
        return False
    try:
        os.kill(owner[0], 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _alive(path: Path, place: Path) -> str:
    owner = _owner(place)
    who = "another process" if owner is None else f"process {owner[0]} on {owner[1]}"
    return (
        f"A run that has not ended is writing to {str(path)!r}: {who}. Wait until it has, or end it, or give this one "
        "another path."
    )
