"""POPE: whether an object is in the image."""

from typing import ClassVar

from catp_lightning.data.benchmarks.reader import Reader, Record, file_name
from catp_lightning.data.records import field, read_json_lines
from catp_lightning.errors import DataError


class POPE(Reader):
    """POPE (arXiv 2305.10355), "is there a dog in the image?", to be answered by yes or no.

    The file has a JSON object a line, with `question_id`, `image`, `text` and `label` ("yes" or "no").

    Args:
        questions: one of `coco_pope_random.json`, `coco_pope_popular.json` and `coco_pope_adversarial.json`, from
            https://github.com/AoiDragon/POPE, folder `output/coco`. Scores are reported for each.
        images: the folder of COCO's images, `val2014`.
    """

    metric: ClassVar[str] = "pope"

    def records(self) -> list[Record]:
        return [_record(line, where) for where, line in read_json_lines(self.questions, "a question of POPE a line")]


def _record(line: object, where: str) -> Record:
    question_id = field(line, "question_id", int, where, "POPE's")
    image, text, label = (field(line, name, str, where, "POPE's") for name in ("image", "text", "label"))
    if label not in ("yes", "no"):
        raise DataError(f"{where}: 'label' is {label!r:.80}; it is 'yes' or 'no'. Correct it, or get the file anew.")
    return Record(question_id, file_name(image, where), text, label, question_id)
