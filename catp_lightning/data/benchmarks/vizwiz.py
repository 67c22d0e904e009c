"""VizWiz: questions that blind people asked about their own photos."""

from typing import ClassVar

from catp_lightning.data.benchmarks.reader import Reader, Record, file_name, ten
from catp_lightning.data.records import field, numbered, read_json


class VizWiz(Reader):
    """VizWiz-VQA (arXiv 1802.08218), questions of blind people, with ten answers each.

    The file is a JSON list with `image`, `question` and, except in the test split, `answers` for each question: ten
    objects with `answer`. "unanswerable" is an answer like others. Questions have no id there; their number in the file
    is taken, from 0.

    Args:
        questions: such as `val.json`, from https://vizwiz.org/tasks-and-datasets/vqa.
        images: the folder of the images, such as `val`.
    """

    metric: ClassVar[str] = "vizwiz"

    def records(self) -> list[Record]:
        content = read_json(self.questions, "VizWiz's questions")
        listed = numbered(content, self.questions, "VizWiz's questions")
        return [_record(record, where, number) for number, (where, record) in enumerate(listed)]


def _record(record: object, where: str, number: int) -> Record:
    image, text = (field(record, name, str, where, "VizWiz's") for name in ("image", "question"))
    assert isinstance(record, dict)
    answers = None
    if "answers" in record:
        given = field(record, "answers", list, where, "VizWiz's")
        answers = ten([field(answer, "answer", str, where, "VizWiz's") for answer in given], where)
    return Record(number, file_name(image, where), text, answers, number)
