"""easy-VQA: questions about pictures of one shape in one colour."""

from pathlib import Path
from typing import ClassVar

from catp_lightning.data.benchmarks.reader import Reader, Record
from catp_lightning.data.records import field, numbered, read_json
from catp_lightning.errors import DataError


class EasyVQA(Reader):
    """easy-VQA (https://github.com/vzhou842/easy-VQA), 13 answers: yes, no, three shapes and eight colours.

    The folder has `questions.json`, a list of [question, answer, id of the image], and the images, `images/<id>.png`.

    Args:
        folder: the folder of a split, `easy_vqa/data/train` or `easy_vqa/data/test` of the package `easy-vqa` on PyPI.
    """

    metric: ClassVar[str] = "easyvqa"

    def __init__(self, folder: str) -> None:
        super().__init__(str(Path(folder, "questions.json")), str(Path(folder, "images")))
        self.folder = folder

    def records(self) -> list[Record]:
        content = read_json(self.questions, "a list of easy-VQA's questions")
        listed = numbered(content, self.questions, "a list of easy-VQA's questions")
        return [_record(number, *pair) for number, pair in enumerate(listed)]


def _record(number: int, where: str, record: object) -> Record:
    if not isinstance(record, list) or len(record) != 3:
        raise DataError(
            f"{where} is not in easy-VQA's layout: it must be [question, answer, id of the image], got {record!r:.80}."
        )
    fields = dict(zip(("question", "answer", "image id"), record, strict=True))
    text, answer = (field(fields, name, str, where, "easy-VQA's") for name in ("question", "answer"))
    image = field(fields, "image id", int, where, "easy-VQA's")
    return Record(number, f"{image}.png", text, answer, number)
