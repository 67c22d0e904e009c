"""Questions of TextVQA and VizWiz, in the layouts of the authors' files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from catp_lightning.errors import DataError
from tests.support.benchmark_files import textvqa, vizwiz


def test_textvqa_questions_are_read_with_ten_answers(tmp_path: Path) -> None:
    records = textvqa(tmp_path).records()
    assert records[0] == (34602, "003a8ae2ef43b901.jpg", "what is the brand?", ["nokia"] * 10, 34602)
    assert records[1].reference[6:] == ["tuborg", "tubor", "Copenhagen.", "unknown"]
    assert records[2].image == "02685c6f63b1bd66.jpg"


def test_vizwiz_questions_are_numbered_and_read_with_ten_answers(tmp_path: Path) -> None:
    records = vizwiz(tmp_path).records()
    assert records[0] == (0, "VizWiz_val_00000000.jpg", "What color is it?", ["grey"] * 5 + ["gray"] * 5, 0)
    assert records[1].reference == ["unanswerable"] * 8 + ["no", "yes"]
    assert [record.question_id for record in records] == [0, 1, 2]


def test_a_test_split_has_no_answers(tmp_path: Path) -> None:
    for reader in (textvqa(tmp_path / "textvqa"), vizwiz(tmp_path / "vizwiz")):
        place = Path(reader.questions)
        content = json.loads(place.read_text())
        for record in content["data"] if isinstance(content, dict) else content:
            del record["answers"]
        place.write_text(json.dumps(content))
        assert [record.reference for record in reader.records()] == [None] * 3


@pytest.mark.parametrize(
    ("write", "change", "message"),
    [
        (textvqa, {"answers": ["a"] * 9}, "record number 1: 'answers' must be 10 texts, .* got 9"),
        (textvqa, {"answers": ["a"] * 9 + [1]}, "must be 10 texts"),
        (textvqa, {"answers": "aaaaaaaaaa"}, "'answers' must be list, got 'aaaaaaaaaa'"),
        (textvqa, {"image_id": "../x"}, r"names the image '\.\./x\.jpg'"),
        (textvqa, {"question_id": None}, "not in TextVQA's layout: 'question_id' must be int"),
        (vizwiz, {"answers": [{"answer": "a"}] * 11}, "record number 1: 'answers' must be 10 texts, .* got 11"),
        (vizwiz, {"answers": ["a"] * 10}, "not in VizWiz's layout: 'answer' must be str"),
        (vizwiz, {"image": None}, "'image' must be str, got None"),
        (vizwiz, {"image": "/etc/x.jpg"}, "names the image '/etc/x.jpg'"),
    ],
)
def test_what_is_not_in_the_layout_is_named(
    write: Callable[..., Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        write(tmp_path, **change).records()


@pytest.mark.parametrize(("write", "content"), [(textvqa, []), (textvqa, {"data": []}), (vizwiz, {}), (vizwiz, [])])
def test_a_file_of_another_layout_is_refused(write: Callable[..., Any], content: Any, tmp_path: Path) -> None:
    reader = write(tmp_path)
    Path(reader.questions).write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"does not hold .*a list that is not empty"):
        reader.records()
