"""What a reader of a data set of videos is: videos are files or folders of frames."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

from catp_lightning.data.benchmarks.reader import Reader, Record
from catp_lightning.data.image_folder import ImageFolder
from catp_lightning.data.videos import Clip, bounded, numbers_in, read_video, require_av
from catp_lightning.data.vqa_dataset import Visual
from catp_lightning.errors import DataError

MAX_FRAMES = 1024
"""Limit on the frames of a question."""

_SUFFIXES = (".jpg", ".jpeg", ".png")


class VideoReader(Reader):
    """Reads the questions of one split of a data set of videos.

    Frames are the middles of equal stretches of a video, or of the part of it that is asked about. A video is a file,
    which PyAV reads, or a folder of frames with numbers as names, from 1 on.

    Args:
        questions: the data set's file of questions.
        videos: the folder of its videos. Files outside of it, where links or names in the file lead, are refused.
        frames: frames of each video that the model sees.

    Raises:
        DataError: `frames` is not from 1 to `MAX_FRAMES`.
    """

    frame_rate: ClassVar[float] = 3.0
    """Frames a second of folders of frames."""

    def __init__(self, questions: str, videos: str, frames: int) -> None:
        super().__init__(questions, images=videos)
        if not 1 <= frames <= MAX_FRAMES:
            raise DataError(f"frames is {frames}; it is a number of frames of each video, from 1 to {MAX_FRAMES}.")
        self.frames = frames

    @property
    def _folder(self) -> ImageFolder:
        return ImageFolder(self.images, holds="video")

    def check_images(self, records: Sequence[Record]) -> None:
        """Raise DataError unless the videos of some records are there and inside the folder, and can be read here."""
        needed: dict[Path, int] = {}
        for record in records:
            needed.setdefault(self.image_path(record), record.question_id)
        self._folder.require(
            needed,
            source=self.questions,
            named="the name in that file",
            outside="Only files inside the folder are read: copy them into it.",
        )
        if not all(path.is_dir() for path in needed):
            require_av()

    def part(self, record: Record) -> tuple[float, float] | None:
        """Return the seconds where the part that a record asks about begins and ends; None: it asks about all."""
        return None

    def visual(self, record: Record) -> Visual:
        """Return the frames of a record's video; DataError if they cannot be read."""
        return Visual(
            clip=self._folder.read_by(partial(self._read, record), self.image_path(record), record.question_id)
        )

    def _read(self, record: Record, path: Path) -> Clip:
        if not path.is_dir():
            return read_video(path, self.frames, self.part(record))
        names = sorted((name for name in os.listdir(path) if name.lower().endswith(_SUFFIXES)), key=_in_order)
        if not names:
            raise OSError(f"there is no frame in that folder, a file that ends in {', '.join(_SUFFIXES)}")
        numbers, first, last = numbers_in(self.frames, len(names), self.frame_rate, self.part(record), start=1)
        # Frames are looked for from the folder of all videos on, so that a link in a folder of frames may not leave it.
        folder = ImageFolder(str(Path(self.images).resolve()))
        read = {number: bounded(folder.read(path / names[number], record.question_id)) for number in set(numbers)}
        return Clip([read[n] for n in numbers], [n - first for n in numbers], last - first + 1, self.frame_rate)


def _in_order(name: str) -> tuple[int, str]:
    stem = Path(name).stem
    return len(stem), stem  # "2" before "10"
