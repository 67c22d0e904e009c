"""Questions that a reader read, with their images or frames of their videos."""

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from catp_lightning.data.benchmarks.reader import Reader, Record
from catp_lightning.data.vqa_dataset import VQAExample, check_fraction
from catp_lightning.errors import DataError


class BenchmarkDataset(Dataset[VQAExample]):
    """Questions of a split with their images or videos, in the file's order; an image is read when its item is.

    Examples have `metric`, the name of the data set's metric, and `reference` where the files have answers; `image_id`
    is the number of the image or video, in the order in which the file names them first.

    Args:
        reader: the reader of the data set's files.
        fraction: share of the questions to keep, in (0, 1]. Questions that are judged together stay together.
        seed: seed of the choice of questions. The same files, fraction and seed give the same questions.

    Raises:
        DataError: as the reader; an id is there twice; some questions have an answer and others have none; an image
            file is missing or outside the folder of images. Reading an item raises it for an image that is unreadable.
        ValueError: `fraction` is outside (0, 1].
    """

    def __init__(self, reader: Reader, fraction: float = 1.0, seed: int = 42) -> None:
        check_fraction(fraction)
        self.reader = reader
        records = reader.records()
        _check(records, reader)
        numbers = {name: number for number, name in enumerate(dict.fromkeys(record.image for record in records))}
        groups = list(dict.fromkeys(record.group for record in records))
        count = max(1, round(fraction * len(groups)))
        drawn = np.random.default_rng(seed).choice(len(groups), count, replace=False)
        chosen = {groups[index] for index in drawn}
        self.records = [record for record in records if record.group in chosen]
        self.image_ids = [numbers[record.image] for record in self.records]
        reader.check_images(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> VQAExample:
        record = self.records[index]
        example = VQAExample(
            question=record.text,
            question_id=record.question_id,
            image_id=self.image_ids[index],
            metric=self.reader.metric,
        )
        visual = self.reader.visual(record)
        if "clip" in visual:
            example["clip"] = visual["clip"]
        else:
            example["image"] = visual["image"]
        if record.reference is not None:
            example["reference"] = record.reference
        return example


def _check(records: Sequence[Record], reader: Reader) -> None:
    seen: set[int] = set()
    for record in records:
        if record.question_id in seen:
            raise DataError(
                f"{reader.questions}: question id {record.question_id} is there twice; ids must be unique. Remove one "
                "of the two, or get the file anew from its authors."
            )
        seen.add(record.question_id)
    without = [record.question_id for record in records if record.reference is None]
    if 0 < len(without) < len(records):
        raise DataError(
            f"{reader.questions}: {len(without)} of {len(records)} questions have no answer, the first with id "
            f"{without[0]}. Either all questions have answers, or none, as in a test split. Remove those without."
        )
