"""DocVQA: questions about pages of documents."""

from typing import ClassVar

from catp_lightning.data.benchmarks.reader import Reader, Record, file_name
from catp_lightning.data.records import data_of, field
from catp_lightning.errors import DataError


class DocVQA(Reader):
    """DocVQA (arXiv 2007.00398), task 1: questions about one page, whose answers stand in it.

    The file is a JSON object whose list "data" has for each question `questionId`, `question`, `image` and, except in
    the test split, `answers`: texts, each of which is right. Some releases have the pages in the folder `documents`
    that `image` names, others in `spdocvqa_images`; that part of the name is left out.

    Args:
        questions: such as `val_v1.0_withQT.json`, from https://rrc.cvc.uab.es/?ch=17&com=downloads.
        images: the folder of the pages, such as `spdocvqa_images`.
    """

    metric: ClassVar[str] = "docvqa"

    def records(self) -> list[Record]:
        return [_record(record, where) for where, record in data_of(self.questions, "DocVQA's")]


def _record(record: object, where: str) -> Record:
    question_id = field(record, "questionId", int, where, "DocVQA's")
    image, text = (field(record, name, str, where, "DocVQA's") for name in ("image", "question"))
    assert isinstance(record, dict)
    answers = field(record, "answers", list, where, "DocVQA's") if "answers" in record else None
    if answers is not None and not (answers and all(isinstance(answer, str) for answer in answers)):
        raise DataError(f"{where}: 'answers' must be one text or more, got {answers!r:.200}.")
    return Record(question_id, file_name(image.removeprefix("documents/"), where), text, answers, question_id)
