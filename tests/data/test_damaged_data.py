"""Damaged data sets and images: read, or refused."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch

from catp_lightning.data.vqa import VQADataset
from catp_lightning.errors import DataError
from tests.support.fuzzing import Mutator, many
from tests.support.image_files import ODD, encoded, noise, split_of


def fuzz_data(count: int, place: Path, canary: Path) -> None:
    """Questions and annotations in turn: read to the last item, or refused."""
    split = split_of(place, {"x": encoded(noise(4, 4)), "y": encoded(noise(3, 5))})
    split.annotations = str(place / "annotations.json")
    ten = [{"answer": "yes", "answer_id": number} for number in range(10)]
    documents = {
        "questions": json.loads(Path(split.questions).read_text()) | {"info": {"year": 2014}},
        "annotations": {"annotations": [{"question_id": number, "image_id": 0, "answers": ten} for number in (0, 10)]},
    }
    for name, document in documents.items():
        (place / f"{name}.json").write_text(json.dumps(document))
    whole = {name: (place / f"{name}.json").read_bytes() for name in documents}

    def each(seed: int) -> bool:
        mutator, name = Mutator(seed, canary), ("questions", "annotations")[seed % 2]
        content = mutator.document(documents[name]) if seed % 3 else mutator.bytes(whole[name])
        (place / f"{name}.json").write_bytes(content)
        try:
            dataset = VQADataset(split)
            for number in range(len(dataset)):
                example = dataset[number]
                assert len(example["answers"]) == 10 and example["question"].encode() is not None
                torch.tensor([example["question_id"], example["image_id"]])
        except DataError:
            return False
        finally:
            (place / f"{name}.json").write_bytes(whole[name])
        return True

    assert 0.01 * count < many(count, each) < 0.9 * count


def fuzz_images(count: int, place: Path, canary: Path) -> None:
    contents = [make() for name, make in ODD.items() if "thousand" not in name and "64" not in name]
    split = split_of(place, {"x": contents[0]})
    dataset, file = VQADataset(split), Path(split.images, "0.png")

    def each(seed: int) -> bool:
        file.write_bytes(Mutator(seed, canary).bytes(contents[seed % len(contents)]))
        try:
            image = dataset[0]["image"]
        except DataError:
            return False
        assert image.mode == "RGB" and math.prod(image.size) > 0
        return True

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow says what it meets
        assert 0.01 * count < many(count, each) < 0.99 * count


@pytest.mark.slow
def test_damaged_data_sets_and_images_are_read_or_refused(tmp_path: Path, canary: Path) -> None:
    fuzz_data(200, tmp_path / "data", canary)
    fuzz_images(200, tmp_path / "images", canary)


@pytest.mark.slow
def test_fifty_thousand_damaged_data_sets_and_images_are_read_or_refused(tmp_path: Path, canary: Path) -> None:
    fuzz_data(35_000, tmp_path / "data", canary)
    fuzz_images(15_000, tmp_path / "images", canary)
