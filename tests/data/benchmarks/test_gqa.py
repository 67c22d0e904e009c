"""Questions of GQA, in the layout of the authors' files."""

import json
from pathlib import Path
from typing import Any

import pytest

from catp_lightning.errors import DataError
from tests.support.benchmark_files import gqa


def test_balanced_questions_are_read_with_their_answer(tmp_path: Path) -> None:
    assert gqa(tmp_path).records() == [
        (20131, "n0.jpg", "Is it cloudy?", "yes", 20131),
        (20132, "n0.jpg", "Which color is the bus?", "red", 20132),
        (20133, "n1.jpg", "Is it old?", "no", 20133),
    ]


def test_a_test_split_has_no_answers(tmp_path: Path) -> None:
    reader = gqa(tmp_path)
    place = Path(reader.questions)
    content = json.loads(place.read_text())
    place.write_text(json.dumps({key: {k: v for k, v in q.items() if k != "answer"} for key, q in content.items()}))
    assert [record.reference for record in reader.records()] == [None] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"imageId": 7}, "question '020132' is not in GQA's layout: 'imageId' must be str, got 7"),
        ({"imageId": "../n1"}, r"question '020132' names the image '\.\./n1\.jpg'"),
        ({"question": None}, "'question' must be str, got None"),
        ({"answer": ["red"]}, "'answer' must be str"),
    ],
)
def test_what_is_not_in_the_layout_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        gqa(tmp_path, **change).records()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must be an object of questions by id"),
        ({}, "must be an object of questions by id"),
        ({"x1": {"imageId": "n0", "question": "?"}}, "a whole number of at most 18 digits"),
        ({"²": {"imageId": "n0", "question": "?"}}, "a whole number of at most 18 digits"),
        ({"1" * 19: {"imageId": "n0", "question": "?"}}, "a whole number of at most 18 digits"),
        ({"1": {"imageId": "n0", "question": "?", "isBalanced": False}}, "has no balanced question"),
        ({"1": "?"}, "'imageId' must be str, got None"),
    ],
)
def test_a_file_of_another_layout_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    reader = gqa(tmp_path)
    Path(reader.questions).write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        reader.records()
