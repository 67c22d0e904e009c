"""Write files whole or not at all, and read only regular files."""

import errno
import json
import os
import secrets
import stat
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any


def read_bytes(path: str | Path, max_bytes: int | None = None) -> bytes:
    """Return the content of a regular file; a pipe would be waited for, and a device may have no end.

    Args:
        path: path of the file, or a link to one.
        max_bytes: limit on the bytes of the file; None: any number.

    Raises:
        OSError: the file cannot be read, is not a regular file, or is larger than `max_bytes`; nothing is then
            returned, and a file that is too large from the start is not read at all.
    """
    _require_regular(os.stat(path).st_mode, path)
    with open(path, "rb", opener=_without_waiting) as file:  # it may have become a pipe since
        found = os.fstat(file.fileno())
        _require_regular(found.st_mode, path)
        if max_bytes is None:
            return file.read()
        content = b"" if found.st_size > max_bytes else file.read(max_bytes + 1)  # it may be growing
    if max(found.st_size, len(content)) > max_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {max_bytes:,} bytes, the most that is read here", str(path))
    return content


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has no such pipes and lacks the flag


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _require_regular(mode: int, path: str | Path) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` to `path` in UTF-8, atomically as `write_bytes` does."""
    return write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes, durable: bool = True) -> Path:
    """Write `content` to `path` atomically: a reader, or a run after a crash, sees the old file or the new one.

    A file that is replaced keeps its permissions; where `path` is a link, it stays one, and what it leads to is
    replaced.

    Args:
        path: path of the file; its folder is made where it does not exist.
        content: new content of the file.
        durable: wait until the file is on the disk, so that this holds after a power cut as well: some milliseconds.

    Returns:
        `path`.

    Raises:
        OSError: the folder cannot be created or written, the disk is full, or `path` is a pipe or a device; an old file
            at `path` is then untouched.
    """
    path = Path(path)
    try:
        _write(_target(path), content, durable)
    except OSError as error:
        raise explained(error, path) from error
    return path


def _write(path: Path, content: bytes, durable: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.stat() if path.exists() else None
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        # The umask says who may read a new file; a replacement is at no moment readable by others than the old file.
        with open(temporary, "xb", opener=partial(os.open, mode=0o600 if before else 0o666)) as file:
            if before is not None:
                with suppress(OSError, AttributeError):  # not ours to give away, or Windows
                    os.chown(temporary, before.st_uid, before.st_gid)
                os.chmod(temporary, stat.S_IMODE(before.st_mode))
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # the folder may be gone; the first error is the one to raise
            os.unlink(temporary)
        raise


def _target(path: Path) -> Path:
    """Return the file to write for `path`, links followed; raise OSError if it exists and is not a regular file."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:  # also for a link whose target does not exist yet
        return Path(os.path.realpath(path)) if path.is_symlink() else path
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    _require_regular(mode, path)
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def write_json(path: str | Path, value: Any, indent: int | None = None) -> Path:
    """Write `value` to `path` as strict JSON, atomically as `write_bytes` does; NaN and infinity raise ValueError."""
    return write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def check_writable(path: str | Path) -> None:
    """Raise the OSError that `write_bytes` would, at the start of a run, not after hours of work; leave nothing behind.

    Raises:
        OSError: `path` is a folder, a pipe or a device, its folder cannot be created or written, or the disk is full
            already.
    """
    path = Path(path)
    try:
        folder = next(parent for parent in _target(path).absolute().parents if os.path.lexists(parent))
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(4096))  # a full disk still has room for an empty file
    except OSError as error:
        raise explained(error, path) from error


def explained(error: OSError, path: Path) -> OSError:
    """Return an error of the same kind as the system's, with the file that was meant and what to do."""
    if error.errno is None:
        return error
    why = error.strerror or os.strerror(error.errno)
    told = f"{why}, so nothing was written; free space, or give a path that can be written"
    return OSError(error.errno, told, str(path))  # OSError makes a PermissionError of it, or another subclass


def require_writable(path: Path, folder: bool) -> None:
    """Raise OSError now if `path`, given as --output, could not be written after the work, as a folder or a file."""
    if path.exists() and path.is_dir() != folder:
        kind, wanted = ("a folder", "a file") if path.is_dir() else ("a file", "a folder")
        raise FileExistsError(f"--output {path} is {kind}, but {wanted} is to be written.")
    place = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not place.is_dir() and place != path:
        raise NotADirectoryError(f"--output {path} cannot be written: {place} is not a folder.")
    if not os.access(place, os.W_OK):
        raise PermissionError(f"--output {path} cannot be written: no permission for {place}.")
