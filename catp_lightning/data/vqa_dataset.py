"""Questions, answers and images in the official VQAv2 layout, read from files.

A split is a questions file, a folder of images and, where accuracy is measured, an annotations file with ten answers a
question: https://visualqa.org/download.html. Digit scenes (`catp_lightning.data.scenes`) come in the same layout.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple, NotRequired, Self, TypedDict

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from catp_lightning.data.image_folder import ImageFolder
from catp_lightning.data.images import MAX_PIXELS
from catp_lightning.data.records import field, read_json
from catp_lightning.data.videos import Clip
from catp_lightning.errors import DataError

ANSWERS = 10  # people asked about each question; the official accuracy is defined for ten


@dataclass
class VQASplit:
    """Files of one split in VQAv2's layout, and limits on reading them.

    Args:
        questions: the questions file, such as `v2_OpenEnded_mscoco_val2014_questions.json`.
        images: the folder of the images.
        annotations: the annotations file; None where no answers are known, as in VQAv2's test split.
        image_name: name of an image's file in the folder; `{image_id}` stands for its id.
        allow_outside: read images that lie outside the folder too, where links or `image_name` lead. They are refused
            by default, or a data set from elsewhere could have any file of this machine read as an image.
        max_pixels: limit on the pixels of an image; decoding takes 3 to 16 bytes a pixel. `PIL.Image.MAX_IMAGE_PIXELS`
            holds as well.

    Raises:
        DataError: `image_name` is the same for every image, or has other fields; `max_pixels` is below 1.
    """

    questions: str
    images: str
    annotations: str | None = None
    image_name: str = "COCO_val2014_{image_id:012d}.jpg"
    allow_outside: bool = False
    max_pixels: int = MAX_PIXELS

    @classmethod
    def of_scenes(cls, folder: Path) -> Self:
        """Return the split that `scenes.write_scenes` wrote into `folder`."""
        questions, annotations = str(folder / "questions.json"), str(folder / "annotations.json")
        return cls(questions, str(folder / "images"), annotations, "{image_id:012d}.png")

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise DataError(f"max_pixels is {self.max_pixels}; it is a number of pixels, at least 1.")
        try:
            fields = [(name, spec or "") for _, name, spec, _ in Formatter().parse(self.image_name) if name is not None]
            if any(name != "image_id" or re.search(r"[{}]|\d{4}", spec) for name, spec in fields):
                raise ValueError("its one field is image_id, and a width has three digits at most")
            distinct = self.image_name.format(image_id=1) != self.image_name.format(image_id=2)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise DataError(f"image_name={self.image_name!r} cannot be filled in: {error!r}. {_NAME_HELP}") from error
        if not distinct:
            raise DataError(f"image_name={self.image_name!r} names one file for all images. {_NAME_HELP}")


_NAME_HELP = "Use the field image_id, as in 'COCO_val2014_{image_id:012d}.jpg' or '{image_id:012d}.png'."


class Visual(TypedDict, total=False):
    """What a question is about: an `image`, RGB and upright, or in its place a `clip`, frames of a video."""

    image: Image.Image
    clip: Clip


class VQAExample(Visual):
    """One question with its image, or frames of its video; `answers` only where the split has annotations.

    `question_type` ("how many") and `answer_type` ("number") are there where every question's annotation has one;
    `metric` and `reference` are those of `BenchmarkDataset`.
    """

    question: str
    question_id: int
    image_id: int
    answers: NotRequired[list[str]]
    question_type: NotRequired[str]
    answer_type: NotRequired[str]
    metric: NotRequired[str]
    reference: NotRequired[Any]


class _Question(NamedTuple):
    question_id: int
    image_id: int
    text: str


class VQADataset(Dataset[VQAExample]):
    """Questions of a split with their images, in the file's order; an image is read when its item is.

    Images are PNG, JPEG, WebP, GIF, BMP or TIFF by their content, whatever their names say. They are turned as their
    EXIF data says, of several frames the first is taken, transparency is ignored, and of 16 bits of grey the upper 8
    are read. Images of more than 2**24 pixels, more than any processor reads, are scaled down to that as they are read.

    Args:
        split: files of the split, and limits on reading them.
        fraction: share of the questions to keep, in (0, 1]; at least one is kept.
        seed: seed of the choice of questions. The same file, fraction and seed give the same questions.

    Raises:
        DataError: a file is missing, is not JSON, or not in VQAv2's layout; a question id is there twice; a chosen
            question has no annotation, or its image file is missing or outside the folder. Reading an item raises it
            for an image that is unreadable, of another format or of more than `max_pixels`, or that would unpack to
            more than its pixels.
        ValueError: `fraction` is outside (0, 1].
    """

    def __init__(self, split: VQASplit, fraction: float = 1.0, seed: int = 42) -> None:
        check_fraction(fraction)
        self.split = split
        questions = _read_questions(split.questions)
        count = max(1, round(fraction * len(questions)))
        chosen = np.sort(np.random.default_rng(seed).choice(len(questions), count, replace=False))
        self.questions = [questions[index] for index in chosen]
        self.answers: list[list[str]] | None = None
        self.question_types: list[str] = []
        self.answer_types: list[str] = []
        if split.annotations:
            records = _read_annotations(split.annotations, self.questions)
            self.answers = [_ten_answers(record, split.annotations) for record in records]
            self.question_types, self.answer_types = _texts(records, "question_type"), _texts(records, "answer_type")
        self._require_images()

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> VQAExample:
        question_id, image_id, text = self.questions[index]
        image = self._folder.read(self._image_path(image_id), question_id)
        example = VQAExample(image=image, question=text, question_id=question_id, image_id=image_id)
        if self.answers is not None:
            example["answers"] = self.answers[index]
        if self.question_types:
            example["question_type"] = self.question_types[index]
        if self.answer_types:
            example["answer_type"] = self.answer_types[index]
        return example

    def _image_path(self, image_id: int) -> Path:
        return Path(self.split.images) / self.split.image_name.format(image_id=image_id)

    @property
    def _folder(self) -> ImageFolder:
        return ImageFolder(self.split.images, self.split.allow_outside, self.split.max_pixels)

    def _require_images(self) -> None:
        self._folder.require(
            {self._image_path(question.image_id): question.question_id for question in self.questions},
            source=self.split.questions,
            named=f"image_name={self.split.image_name!r}",
            outside="Where that is meant, give the split allow_outside=True.",
        )


def check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}. It is the share of the questions to keep.")


def _read_records(path: str, key: str) -> list[Any]:
    """Return the list under `key` of the JSON object in a file; raise DataError if it holds none."""
    content = read_json(path, f"the {key} in VQAv2's JSON layout")
    records = content.get(key) if isinstance(content, dict) else None
    if not isinstance(records, list) or not records:
        raise DataError(
            f"{path} is not a VQAv2 {key} file: it must be an object with a list {key!r} that is not empty."
        )
    return records


def _field(record: Any, name: str, kind: type, where: str) -> Any:
    return field(record, name, kind, where, "VQAv2's")


def _read_questions(path: str) -> list[_Question]:
    questions: dict[int, _Question] = {}
    for index, record in enumerate(_read_records(path, "questions")):
        where = f"{path}, question number {index}"
        question_id = _field(record, "question_id", int, where)
        if question_id in questions:
            raise DataError(f"{where}: question_id {question_id} is there twice; ids must be unique.")
        image_id, text = _field(record, "image_id", int, where), _field(record, "question", str, where)
        questions[question_id] = _Question(question_id, image_id, text)
    return list(questions.values())


def _read_annotations(path: str, questions: Sequence[_Question]) -> list[dict[str, Any]]:
    """Return the annotation of each question, in the questions' order."""
    annotations: dict[int, Any] = {}
    for index, record in enumerate(_read_records(path, "annotations")):
        where = f"{path}, annotation number {index}"
        question_id = _field(record, "question_id", int, where)
        if question_id in annotations:
            raise DataError(f"{where}: question_id {question_id} is there twice; ids must be unique.")
        annotations[question_id] = record
    missing = [question.question_id for question in questions if question.question_id not in annotations]
    if missing:
        raise DataError(
            f"{path} has no annotation for {len(missing)} of {len(questions)} questions, the first with question_id "
            f"{', '.join(map(str, missing[:3]))}. Questions and annotations must be of the same split."
        )
    return [annotations[question.question_id] for question in questions]


def _texts(records: Sequence[dict[str, Any]], name: str) -> list[str]:
    """Return the text under a name of each annotation; none where one lacks it: nothing else depends on it."""
    texts: list[Any] = [record.get(name) for record in records]
    return texts if all(isinstance(text, str) for text in texts) else []


def _ten_answers(record: Any, path: str) -> list[str]:
    where = f"{path}, annotation of question {record['question_id']}"
    answers = [_field(answer, "answer", str, where) for answer in _field(record, "answers", list, where)]
    if len(answers) != ANSWERS:
        raise DataError(f"{where}: {len(answers)} answers, but VQA accuracy is defined for {ANSWERS}.")
    return answers
