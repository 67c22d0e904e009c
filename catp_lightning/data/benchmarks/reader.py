"""What a reader of a data set's official files is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, ClassVar, NamedTuple

from catp_lightning.data.image_folder import ImageFolder
from catp_lightning.data.vqa_dataset import ANSWERS, Visual
from catp_lightning.errors import DataError


class Record(NamedTuple):
    """A question as a reader returns it.

    Attributes:
        question_id: the data set's own id where it has whole numbers, else the number of the question, from 0.
        image: name of the image or video, which is its path in the folder of images where images are files.
        text: the question, with its options where it has some.
        reference: what the data set's metric compares an answer with; None where the file has no answers.
        group: number of the questions that are judged together, such as the two about an image of MME.
    """

    question_id: int
    image: str
    text: str
    reference: Any
    group: int


class Reader(ABC):
    """Reads the questions of one split from the official files of a data set.

    A subclass sets `metric`, a name in `catp_lightning.metrics.benchmarks.BENCHMARKS`, and implements `records`.

    Args:
        questions: the data set's file of questions.
        images: the folder of its images. Files outside of it, where links or names in the file lead, are refused.
    """

    metric: ClassVar[str]

    def __init__(self, questions: str, images: str) -> None:
        self.questions, self.images = questions, images

    @abstractmethod
    def records(self) -> list[Record]:
        """Read the files and return all questions, in the file's order; no image is opened.

        Raises:
            DataError: a file is missing, damaged, or not in the data set's layout.
        """

    def check_images(self, records: Sequence[Record]) -> None:
        """Raise DataError unless the images of some records are there and inside the folder of images."""
        needed: dict[Path, int] = {}
        for record in records:
            needed.setdefault(self.image_path(record), record.question_id)
        ImageFolder(self.images).require(
            needed,
            source=self.questions,
            named="the name in that file",
            outside="Only files inside the folder are read: copy them into it.",
        )

    def visual(self, record: Record) -> Visual:
        """Return the image of a record, RGB and upright; DataError if it cannot be read."""
        return Visual(image=ImageFolder(self.images).read(self.image_path(record), record.question_id))

    def image_path(self, record: Record) -> Path:
        """Return where the image of a record is."""
        return Path(self.images, record.image)


def file_name(name: str, where: str, holds: str = "image") -> str:
    """Return a path from an annotation file, if it can be of a file in the folder of images (or what it `holds`).

    Raises:
        DataError: it is empty or absolute, or has `..` in it.
    """
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    parts = {*posix.parts, *windows.parts}
    if not parts or "\0" in name or posix.is_absolute() or windows.drive or windows.root or ".." in parts:
        raise DataError(
            f"{where} names the {holds} {name!r:.200}. That is a path in the folder of {holds}s, as in "
            "'documents/1.png': not empty, not absolute, without '..'. Correct it, or get the file anew."
        )
    return name


def ten(answers: Sequence[Any], where: str) -> list[str]:
    """Return the answers of ten people, if they are that."""
    if len(answers) != ANSWERS or not all(isinstance(answer, str) for answer in answers):
        raise DataError(
            f"{where}: 'answers' must be {ANSWERS} texts, for which the accuracy is defined, got {len(answers)}: "
            f"{answers!r:.200}."
        )
    return list(answers)


def with_options(question: str, options: Sequence[str], hint: str = "") -> str:
    """Return a question as models are asked it: the hint, the question, and a line "A. ..." for each option.

    >>> print(with_options("Which is blue?", ["sky", "grass"], "Look up."))
    Look up.
    Which is blue?
    A. sky
    B. grass
    """
    lettered = [f"{chr(ord('A') + number)}. {option}" for number, option in enumerate(options)]
    return "\n".join([*([hint] if hint else []), question, *lettered])
