"""OCRBench: text to be read in images of all kinds."""

from collections.abc import Mapping
from typing import ClassVar

from catp_lightning.data.benchmarks.reader import Reader, Record, file_name
from catp_lightning.data.benchmarks.references import Reading
from catp_lightning.data.records import field, numbered, read_json
from catp_lightning.errors import DataError, did_you_mean

KINDS: Mapping[str, str] = {
    "Regular Text Recognition": "text_recognition",
    "Irregular Text Recognition": "text_recognition",
    "Artistic Text Recognition": "text_recognition",
    "Handwriting Recognition": "text_recognition",
    "Digit String Recognition": "text_recognition",
    "Non-Semantic Text Recognition": "text_recognition",
    "Scene Text-centric VQA": "scene_text_vqa",
    "Doc-oriented VQA": "document_vqa",
    "Key Information Extraction": "key_information",
    "Handwritten Mathematical Expression Recognition": "formulas",
}
"""Part of the score that each `type` of a question belongs to."""

FORMULAS = "HME100k"
"""The data set whose answers are formulas."""


class OCRBench(Reader):
    """OCRBench (arXiv 2305.07895), 1,000 questions of ten kinds about text in images.

    The file is a JSON list with `dataset_name`, `type`, `image_path`, `question` and `answers`, a text or several, for
    each question. Ids in it are those of other data sets; the number of a question is taken, from 0.

    Args:
        questions: `OCRBench.json`, from https://github.com/Yuliang-Liu/MultimodalOCR, folder `OCRBench/json_files`.
        images: the folder `OCRBench_Images`, which is a download of its own there.
    """

    metric: ClassVar[str] = "ocrbench"

    def records(self) -> list[Record]:
        listed = numbered(read_json(self.questions, "OCRBench's questions"), self.questions, "OCRBench's questions")
        return [_record(record, where, number) for number, (where, record) in enumerate(listed)]


def _record(record: object, where: str, number: int) -> Record:
    data_set, kind, image, text = (
        field(record, name, str, where, "OCRBench's") for name in ("dataset_name", "type", "image_path", "question")
    )
    if kind not in KINDS:
        raise DataError(f"{where}: 'type' is {kind!r:.80}; it is one of {', '.join(KINDS)}.{did_you_mean(kind, KINDS)}")
    assert isinstance(record, dict)
    answers = record.get("answers")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"{where}: 'answers' must be a text or several, got {answers!r:.200}.")
    reference = Reading(kind, tuple(answers), data_set == FORMULAS)
    return Record(number, file_name(image, where), text, reference, number)
