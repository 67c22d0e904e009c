"""Files are written whole or not at all."""

import errno
import json
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_text(path: str | Path, text: str) -> Path:
    """`write_bytes` of text in UTF-8."""
    return write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes, durable: bool = True) -> Path:
    """Write `content` to `path` atomically: a reader, or a run after a crash, sees the old file or the new one.

    Args:
        path: its folder is made where it does not exist.
        content: of the file.
        durable: wait until it is on the disk, so that this holds after a power cut as well: some milliseconds a file.

    Raises:
        OSError: the folder cannot be created or written, or the disk is full; an old file at `path` is then untouched.
    """
    path = Path(path)
    try:
        _write(path, content, durable)
    except OSError as error:
        raise _explained(error, path) from error
    return path


def _write(path: Path, content: bytes, durable: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:  # whom the umask allows may read it; mkstemp would let its owner alone
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # the folder may be gone, and what went wrong first is what to tell
            os.unlink(temporary)
        raise


def write_json(path: str | Path, value: Any, indent: int | None = None) -> Path:
    """`write_text` of strict JSON: NaN and infinity raise ValueError."""
    return write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def check_writable(path: str | Path) -> None:
    """Raise what `write_bytes` would: at the start of a run, not after its hours of work. Nothing is left behind.

    Raises:
        OSError: `path` is a folder, its folder cannot be created or written, or the disk is full already.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(4096))  # of a full disk a name can still be had
    except OSError as error:
        raise _explained(error, path) from error


def _explained(error: OSError, path: Path) -> OSError:
    """The same kind of error, with the file that was meant and what to do."""
    if error.errno is None:
        return error
    told = f"{os.strerror(error.errno)}, so nothing was written; free space, or give a path that can be written"
    return OSError(error.errno, told, str(path))  # this makes a PermissionError, or whichever it is


def require_writable(path: Path, folder: bool) -> None:
    """Raise OSError now where a file could not be written after the work."""
    if path.exists() and path.is_dir() != folder:
        kind, wanted = ("a folder", "a file") if path.is_dir() else ("a file", "a folder")
        raise FileExistsError(f"--output {path} is {kind}, but {wanted} is to be written.")
    place = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not place.is_dir() and place != path:
        raise NotADirectoryError(f"--output {path} cannot be written: {place} is not a folder.")
    if not os.access(place, os.W_OK):
        raise PermissionError(f"--output {path} cannot be written: no permission for {place}.")
