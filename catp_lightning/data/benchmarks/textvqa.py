"""TextVQA: questions about text in the image."""

from typing import ClassVar

from catp_lightning.data.benchmarks.reader import Reader, Record, file_name, ten
from catp_lightning.data.records import data_of, field


class TextVQA(Reader):
    """TextVQA (arXiv 1904.08920), questions about text in the image, with ten answers each.

    The file is a JSON object whose list "data" has for each question `question_id`, `image_id`, `question` and, except
    in the test split, `answers`: ten texts.

    Args:
        questions: such as `TextVQA_0.5.1_val.json`, from https://textvqa.org/dataset.
        images: the folder of the images, `<image_id>.jpg` each; `train_images` for training and validation.
    """

    metric: ClassVar[str] = "textvqa"

    def records(self) -> list[Record]:
        return [_record(record, where) for where, record in data_of(self.questions, "TextVQA's")]


def _record(record: object, where: str) -> Record:
    question_id = field(record, "question_id", int, where, "TextVQA's")
    image, text = (field(record, name, str, where, "TextVQA's") for name in ("image_id", "question"))
    assert isinstance(record, dict)
    answers = ten(field(record, "answers", list, where, "TextVQA's"), where) if "answers" in record else None
    return Record(question_id, file_name(f"{image}.jpg", where), text, answers, question_id)
