"""Questions of DocVQA and OCRBench, in the layouts of the authors' files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from catp_lightning.errors import DataError
from tests.support.benchmark_files import docvqa, ocrbench


def test_docvqa_questions_are_read_with_all_right_answers(tmp_path: Path) -> None:
    records = docvqa(tmp_path).records()
    assert records[1] == (49154, "pybv0228_81.png", "Which company is it?", ["ITC Limited", "itc limited"], 49154)
    assert records[2].image == "pybv0228_82.png"


def test_a_test_split_of_docvqa_has_no_answers(tmp_path: Path) -> None:
    reader = docvqa(tmp_path)
    place = Path(reader.questions)
    content = json.loads(place.read_text())
    for record in content["data"]:
        del record["answers"]
    place.write_text(json.dumps(content))
    assert [record.reference for record in reader.records()] == [None] * 3


def test_ocrbench_questions_are_numbered_and_read_with_their_kind(tmp_path: Path) -> None:
    records = ocrbench(tmp_path).records()
    assert [record.question_id for record in records] == [0, 1, 2, 3]
    assert records[1].reference == ("Scene Text-centric VQA", ("Airfrance", "Air france"), False)
    assert records[2].reference == ("Doc-oriented VQA", ("1/8/93",), False)
    assert records[3].reference == ("Handwritten Mathematical Expression Recognition", ("x _ { 1 } = 0\n",), True)


@pytest.mark.parametrize(
    ("write", "change", "message"),
    [
        (docvqa, {"answers": []}, "record number 1: 'answers' must be one text or more, got "),
        (docvqa, {"answers": [1]}, "'answers' must be one text or more"),
        (docvqa, {"questionId": "1"}, "not in DocVQA's layout: 'questionId' must be int"),
        (docvqa, {"image": "documents/../../x.png"}, r"names the image '\.\./\.\./x\.png'"),
        (docvqa, {"image": "documents/"}, "names the image ''"),
        (ocrbench, {"type": "Doc-oriented VQa"}, "'type' is 'Doc-oriented VQa'; .* Did you mean 'Doc-oriented VQA'"),
        (ocrbench, {"answers": None}, "record number 1: 'answers' must be a text or several, got None"),
        (ocrbench, {"answers": []}, "'answers' must be a text or several"),
        (ocrbench, {"image_path": 7}, "not in OCRBench's layout: 'image_path' must be str, got 7"),
        (ocrbench, {"image_path": "/7.png"}, r"names the image '/7\.png'"),
    ],
)
def test_what_is_not_in_the_layout_is_named(
    write: Callable[..., Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        write(tmp_path, **change).records()


@pytest.mark.parametrize(("write", "content"), [(docvqa, []), (docvqa, {"data": {}}), (ocrbench, {"data": []})])
def test_a_file_of_another_layout_is_refused(write: Callable[..., Any], content: Any, tmp_path: Path) -> None:
    reader = write(tmp_path)
    Path(reader.questions).write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"does not hold .*a list that is not empty"):
        reader.records()
