"""Questions of easy-VQA, in the layout of its package."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from catp_lightning.data.benchmarks import BenchmarkDataset, EasyVQA
from catp_lightning.errors import DataError
from tests.support.benchmark_files import easyvqa


def test_questions_are_read_in_order_with_their_answer(tmp_path: Path) -> None:
    records = easyvqa(tmp_path).records()
    assert records[1] == (1, "0.png", "is there not a black shape in the image?", "yes", 1)
    assert [record.reference for record in records] == ["triangle", "yes", "teal", "no"]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (["is it red?", "yes"], r"record number 1 is not in easy-VQA's layout: it must be \[question, answer, id of"),
        ({"question": "is it red?"}, r"it must be \[question, answer, id of the image\], got {'question'"),
        ("yes", "got 'yes'"),
        (["is it red?", True, 0], "'answer' must be str, got True"),
        (["is it red?", None, 0], "'answer' must be str, got None"),
        ([7, "yes", 0], "'question' must be str, got 7"),
        (["is it red?", "yes", "../0"], "'image id' must be int, got '../0'"),
        (["is it red?", "yes", 2**63], "a whole number of 64 bits"),
    ],
)
def test_what_is_not_in_the_layout_is_named(second: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        easyvqa(tmp_path, second).records()


@pytest.mark.parametrize("content", ["[]", "{}", "7"])
def test_a_file_without_questions_is_refused(content: str, tmp_path: Path) -> None:
    reader = easyvqa(tmp_path)
    Path(reader.questions).write_text(content)
    with pytest.raises(DataError, match=r"questions\.json does not hold a list of easy-VQA's questions"):
        reader.records()


@pytest.mark.slow
@pytest.mark.parametrize(("split", "questions", "images"), [("train", 38_575, 4_000), ("test", 9_673, 1_000)])
def test_the_package_itself_is_read(split: str, questions: int, images: int) -> None:
    found = importlib.util.find_spec("easy_vqa")
    if found is None or found.origin is None:
        pytest.skip("easy-vqa is not installed: pip install easy-vqa")
    dataset = BenchmarkDataset(EasyVQA(str(Path(found.origin).parent / "data" / split)))
    assert (len(dataset), len(set(dataset.image_ids))) == (questions, images)
    assert len({record.reference for record in dataset.records}) == 13
    assert dataset[questions - 1]["image"].size == (64, 64)
