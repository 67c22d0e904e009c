"""GQA: compositional questions about scenes."""

from typing import ClassVar

from catp_lightning.data.benchmarks.reader import Reader, Record, file_name
from catp_lightning.data.records import field, read_json
from catp_lightning.errors import DataError


class GQA(Reader):
    """GQA (arXiv 1902.09506), questions with answers of one word or few.

    The file is a JSON object of questions by id, each with `imageId` and `question`, and `answer` where it is public.
    Questions whose `isBalanced` is false are left out, for the official accuracy is over the balanced ones.

    Args:
        questions: such as `testdev_balanced_questions.json` or `val_balanced_questions.json`, from
            https://cs.stanford.edu/people/dorarad/gqa/download.html.
        images: the folder of GQA's images, `<imageId>.jpg` each.
    """

    metric: ClassVar[str] = "gqa"

    def records(self) -> list[Record]:
        content = read_json(self.questions, "an object of GQA's questions by id")
        if not isinstance(content, dict) or not content:
            raise DataError(f"{self.questions} is not a GQA questions file: it must be an object of questions by id.")
        found = [_record(key, question, f"{self.questions}, question {key!r:.80}") for key, question in content.items()]
        records = [record for record in found if record is not None]
        if not records:
            raise DataError(f"{self.questions} has no balanced question ('isBalanced'), which are those that count.")
        return records


def _record(key: str, question: object, where: str) -> Record | None:
    image, text = (field(question, name, str, where, "GQA's") for name in ("imageId", "question"))
    if not key.isascii() or not key.isdigit() or len(key) > 18:
        raise DataError(f"{where}: the id of a question is a whole number of at most 18 digits. Correct it.")
    assert isinstance(question, dict)
    if question.get("isBalanced") is False:
        return None
    answer = field(question, "answer", str, where, "GQA's") if "answer" in question else None
    return Record(int(key), file_name(f"{image}.jpg", where), text, answer, int(key))
