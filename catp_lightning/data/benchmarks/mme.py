"""MME: two questions about each image, one to be answered by yes and one by no."""

import os
from pathlib import Path
from typing import ClassVar

from catp_lightning.data.benchmarks.reader import Reader, Record
from catp_lightning.data.benchmarks.references import Judgement
from catp_lightning.data.image_folder import ImageFolder
from catp_lightning.data.records import read_text
from catp_lightning.errors import DataError

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = (*PERCEPTION, *COGNITION)

_SUFFIXES = (".jpg", ".png", ".jpeg")


class MME(Reader):
    """MME (arXiv 2306.13394), questions of 14 subtasks to be answered by yes or no.

    The folder has a folder for each subtask, in which an image `<name>.jpg` or `<name>.png` has its questions in
    `<name>.txt`: two lines, each a question, a tab, and "Yes" or "No". Some subtasks have images in `images` and texts
    in `questions_answers_YN`. Folders of other names are left out; so is a subtask that has no folder.

    Args:
        folder: the folder of the subtasks, `MME_Benchmark_release_version` as its authors send it
            (https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation).
    """

    metric: ClassVar[str] = "mme"

    def __init__(self, folder: str) -> None:
        super().__init__(folder, folder)
        self.folder = folder

    def records(self) -> list[Record]:
        texts = [(subtask, text) for subtask in SUBTASKS for text in self._texts(subtask)]
        if not texts:
            raise DataError(f"{self.folder} has no texts in the folder of a subtask of MME: {', '.join(SUBTASKS)}.")
        pairs = [(image, *pair) for image, pair in enumerate(texts)]
        return [record for pair in pairs for record in self._pair(*pair)]

    def _texts(self, subtask: str) -> list[Path]:
        folder = Path(self.folder, subtask)
        apart = folder / "questions_answers_YN"
        listed = sorted((apart if apart.is_dir() else folder).glob("*.txt")) if folder.is_dir() else []
        for path in listed:
            if not ImageFolder(self.folder).inside(path):
                raise DataError(f"{path} leads out of {self.folder!r}; only files inside are read: copy it into it.")
        return listed

    def _pair(self, image: int, subtask: str, path: Path) -> list[Record]:
        lines = [line for line in read_text(str(path), "two questions of MME").split("\n") if line.strip()]
        if len(lines) != 2:
            raise DataError(f"{path} has {len(lines)} questions; MME's score is of two about each image.")
        return [
            self._record(2 * image + number, image, subtask, path, f"{path}, question {number + 1}", line)
            for number, line in enumerate(lines)
        ]

    def _record(self, question_id: int, image: int, subtask: str, path: Path, where: str, line: str) -> Record:
        question, tab, answer = line.strip().partition("\t")
        if not tab or answer.strip() not in ("Yes", "No"):
            raise DataError(f"{where} is {line!r:.200}; it is a question, a tab, and 'Yes' or 'No'.")
        reference = Judgement(question_id, image, subtask, answer.strip().lower())
        return Record(question_id, _image_of(path, self.folder), question, reference, image)


def _image_of(path: Path, folder: str) -> str:
    """Return the image that a text is about, relative to the folder; where there is none, the first that was sought."""
    apart = path.parent.name == "questions_answers_YN"
    stem = (path.parent.parent / "images" if apart else path.parent) / path.stem
    names = [f"{stem}{suffix}" for suffix in _SUFFIXES]
    return os.path.relpath(next((name for name in names if os.path.lexists(name)), names[0]), folder)
