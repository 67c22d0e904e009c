"""Problems of ScienceQA, in the layout of the authors' files."""

import json
from pathlib import Path
from typing import Any

import pytest

from catp_lightning.data.benchmarks import BenchmarkDataset, ScienceQA
from catp_lightning.errors import DataError
from tests.support.benchmark_tasks import scienceqa


def test_problems_with_an_image_are_asked_with_their_choices_in_the_order_of_the_split(tmp_path: Path) -> None:
    records = scienceqa(tmp_path).records()
    assert [record.question_id for record in records] == [3, 1, 2]
    assert records[0].text == "Which is number 2?\nA. zero\nB. one\nC. two\nD. three"
    assert records[0].reference == (("zero", "one", "two", "three"), "A")
    assert records[1].text == "Count.\nWhich is number 0?\nA. zero\nB. one"
    assert records[2].image == "test/2/image.png" and records[2].reference == (("zero", "one", "two"), "B")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 3}, "problem '2': 'answer' is 3; it is the number of a choice, from 0 to 2"),
        ({"answer": -1}, "'answer' is -1"),
        ({"answer": "B"}, "'answer' must be int, got 'B'"),
        ({"choices": ["one"]}, "'choices' must be 2 to 5 texts"),
        ({"choices": list("abcdef")}, "'choices' must be 2 to 5 texts"),
        ({"choices": ["a", 2]}, "'choices' must be 2 to 5 texts"),
        ({"hint": None}, "'hint' must be str, got None"),
        ({"image": "../image.png"}, r"names the image 'test/2/\.\./image\.png'"),
        ({"split": "/etc"}, "names the image '/etc/2/image.png'"),
    ],
)
def test_what_is_not_in_the_layout_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        scienceqa(tmp_path, **change).records()


def test_splits_and_problems_have_to_fit_together(tmp_path: Path) -> None:
    scienceqa(tmp_path)
    with pytest.raises(DataError, match=r"pid_splits\.json has no split 'minitest'; there are: train, val, test"):
        ScienceQA(str(tmp_path), "minitest").records()
    with pytest.raises(DataError, match="no problem of split 'val' has an image"):
        ScienceQA(str(tmp_path), "val").records()
    with pytest.raises(DataError, match=r"1 of 1 image files .* are missing: .*train/5/image\.png"):
        BenchmarkDataset(ScienceQA(str(tmp_path), "train"))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["1", "7"], "val": [1], "train": {}}))
    with pytest.raises(DataError, match=r"no problem '7', which pid_splits\.json lists in 'test'"):
        ScienceQA(str(tmp_path)).records()
    with pytest.raises(DataError, match=r"record number 0 .*must be str, got 1"):
        ScienceQA(str(tmp_path), "val").records()
    with pytest.raises(DataError, match="ids of split 'train': that is a list"):
        ScienceQA(str(tmp_path), "train").records()
    (tmp_path / "pid_splits.json").unlink()
    with pytest.raises(DataError, match=r"pid_splits\.json: there is no such file"):
        ScienceQA(str(tmp_path)).records()
    (tmp_path / "problems.json").write_text("[]")
    with pytest.raises(DataError, match="must be an object of problems by id"):
        ScienceQA(str(tmp_path)).records()
