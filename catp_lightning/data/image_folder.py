"""A folder of image files that are named by others: every one is there, and none lies outside."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from PIL import Image

from catp_lightning.data.images import MAX_PIXELS, read_image
from catp_lightning.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class ImageFolder:
    """Images or videos of a data set in a folder, and limits on reading them.

    Args:
        folder: the folder; it may be a link itself.
        allow_outside: read files outside the folder too, where links or `..` lead.
        max_pixels: limit on the pixels of an image, as in `read_image`.
        holds: "image" or "video", for messages.
    """

    folder: str
    allow_outside: bool = False
    max_pixels: int = MAX_PIXELS
    holds: str = "image"

    def inside(self, path: Path) -> bool:
        """True if a file may be read: it lies in the folder, links followed, or `allow_outside` is set.

        A path that cannot be followed counts as inside: reading it raises the error.
        """
        if self.allow_outside:
            return True
        try:
            return path.resolve().is_relative_to(Path(self.folder).resolve())
        except (OSError, RuntimeError, ValueError):  # such as a loop of links
            return True

    def require(self, needed: Mapping[Path, int], source: str, named: str, outside: str) -> None:
        """Raise DataError unless all files are there and inside the folder.

        Args:
            needed: path of each file, and the number of the first question about it.
            source: file that names them, for the message.
            named: what else names them, for the message: an argument, or a field of the file.
            outside: what to do about files outside of the folder, for the message.
        """
        inside, there = {}, {}
        for folder in {path.parent for path in needed}:  # listed once: asking for 40,000 files singly is slow
            inside[folder] = self.inside(folder)
            there[folder] = _links_of(folder, self.holds) if inside[folder] else {}
        strays = [
            path for path in needed
            if not inside[path.parent] or (there[path.parent].get(path.name) and not self.inside(path))
        ]  # fmt: skip
        if strays:
            raise DataError(
                f"{len(strays)} of {len(needed)} {self.holds} files of {source} lie outside {self.holds}s="
                f"{self.folder!r}, where a link or {named} leads: {_first(strays, needed)}. {outside}"
            )
        missing = [path for path in needed if path.name not in there[path.parent]]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(needed)} {self.holds} files of {source} are missing: "
                f"{_first(missing, needed)}. Check {self.holds}s={self.folder!r} and {named}, or complete the folder."
            )

    def read(self, path: Path, question_id: int) -> Image.Image:
        """Return the image in a file, as `read_image` does; DataError names file and question if it cannot be read."""
        return self.read_by(partial(read_image, max_pixels=self.max_pixels), path, question_id)

    def read_by(self, read: Callable[[Path], T], path: Path, question_id: int) -> T:
        """Return what a function reads from a file; DataError as for `read`, in the place of whatever it raises."""
        try:
            if not self.inside(path):
                raise OSError(f"it lies outside the folder of {self.holds}s, and the split has allow_outside=False")
            return read(path.resolve(strict=True))
        except DataError:  # it says already which file, and what to do
            raise
        except Exception as error:  # damaged files make decoders raise OSError, SyntaxError, zlib.error, ...
            raise DataError(
                f"{path}, the {self.holds} of question {question_id}, cannot be read: {error}. "
                "Replace the file, or leave its questions out of the questions file."
            ) from error


def _first(paths: Sequence[Path], needed: Mapping[Path, int]) -> str:
    first = ", ".join(f"{path} (question {needed[path]})" for path in paths[:3])
    return f"{first}{', …' if len(paths) > 3 else ''}"


def _links_of(folder: Path, holds: str) -> dict[str, bool]:
    """Return the names in a folder, each with True if it is a link; {} if there is no such folder."""
    try:
        if not folder.is_dir():
            return {}
        with os.scandir(folder) as entries:
            return {entry.name: entry.is_symlink() for entry in entries}
    except OSError as error:  # no permission, or a name that is too long
        raise DataError(f"The folder of {holds}s {str(folder)!r:.200} cannot be read: {error!s:.200}.") from error
