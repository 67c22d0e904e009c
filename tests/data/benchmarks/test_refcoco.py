"""Expressions of RefCOCO, in the layout of Qwen-VL's evaluation."""

import json
from pathlib import Path
from typing import Any

import pytest

from catp_lightning.errors import DataError
from tests.support.benchmark_tasks import refcoco


def test_expressions_are_read_with_their_box(tmp_path: Path) -> None:
    records = refcoco(tmp_path).records()
    name = "data/coco/train2014/COCO_train2014_000000000000.jpg"
    assert records[1] == (1, name, "dog on the right", (1.0, 2.0, 11.5, 13.0, 1.0, 1.0), 1)
    assert [record.question_id for record in records] == [0, 1, 2]


def test_units_of_answers_follow_the_image_and_the_scale(tmp_path: Path) -> None:
    assert refcoco(tmp_path, scale=1000).records()[0].reference[4:] == (0.032, 0.024)
    assert refcoco(tmp_path, scale=1).records()[0].reference[4:] == (32, 24)
    with pytest.raises(ValueError, match="scale is 0; it is a number above 0"):
        refcoco(tmp_path, scale=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [1, 2, 3]}, r"line 2: 'bbox' is \[1, 2, 3\]; it is left, top, right and bottom"),
        ({"bbox": [5, 2, 5, 9]}, r"'bbox' is \[5, 2, 5, 9\]"),
        ({"bbox": [-1, 2, 5, 9]}, "'bbox' is"),
        ({"bbox": [1, 2, 5, float("inf")]}, "'bbox' is"),
        ({"bbox": [1, 2, 5, True]}, "'bbox' is"),
        ({"bbox": "1,2,5,9"}, "'bbox' must be list"),
        ({"width": 0}, "the image is 0 x 24 pixels"),
        ({"height": 24.0}, "'height' must be int, got 24.0"),
        ({"sent": None}, "not in RefCOCO's layout: 'sent' must be str"),
        ({"image": "data/../../x.jpg"}, "line 2 names the image"),
    ],
)
def test_what_is_not_in_the_layout_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        refcoco(tmp_path, **change).records()


def test_a_pickle_is_refused_and_not_run(tmp_path: Path, canary: Path) -> None:
    reader = refcoco(tmp_path)
    program = f"(lp0\ncos\nmkdir\np1\n(S{str(canary)!r}\ntRp2\na.".encode()
    Path(reader.questions).write_bytes(program)
    with pytest.raises(DataError, match=r"refcoco_testA\.jsonl, line 1 is not valid JSON"):
        reader.records()
    Path(reader.questions).write_text(json.dumps([1, 2]))
    with pytest.raises(DataError, match="'image' must be str, got None"):
        reader.records()
