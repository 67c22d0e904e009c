"""Questions of MMBench, in the layout of the authors' tables."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from catp_lightning.data.benchmarks import BenchmarkDataset, MMBench
from catp_lightning.data.benchmarks.tsv import read_tsv
from catp_lightning.errors import DataError
from tests.support.benchmark_tasks import mmbench


def test_rotations_are_questions_of_a_group_and_share_its_image(tmp_path: Path) -> None:
    records = mmbench(tmp_path).records()
    assert [record.question_id for record in records] == [241, 1000241, 2000241, 7]
    assert [record.group for record in records] == [241, 241, 241, 7]
    assert [record.image for record in records] == ["241", "241", "241", "7"]
    assert records[0].text == 'Look "up".\nAnd\tdown.\nWhich is blue?\nA. sky\nB. grass\nC. sea'
    assert records[1].text.endswith("A. grass\nB. sea\nC. sky")
    assert records[1].reference == (1000241, 241, 3, ("grass", "sea", "sky"), "C")
    assert records[3].text == "Is it?\nA. yes\nB. no"
    assert records[3].reference == (7, 7, 1, ("yes", "no"), "B")


def test_images_are_those_of_the_table(tmp_path: Path) -> None:
    dataset = BenchmarkDataset(mmbench(tmp_path))
    files = [np.asarray(Image.open(tmp_path / name)) for name in ("1.png", "2.png")]
    for number, file in ((0, 0), (1, 0), (2, 0), (3, 1)):
        np.testing.assert_array_equal(np.asarray(dataset[number]["image"]), files[file])
    assert dataset.image_ids == [0, 0, 0, 1]


def test_a_share_of_the_questions_keeps_all_rotations(tmp_path: Path) -> None:
    reader = mmbench(tmp_path)
    drawn = {tuple(r.question_id for r in BenchmarkDataset(reader, 0.5, seed).records) for seed in range(10)}
    assert drawn == {(241, 1000241, 2000241), (7,)}


def test_a_test_split_has_no_answers(tmp_path: Path) -> None:
    reader = mmbench(tmp_path)
    place = Path(reader.questions)
    place.write_text(place.read_text().replace("\tanswer\t", "\tanswered\t", 1))
    assert [record.reference for record in reader.records()] == [None] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "D"}, "line 2: 'answer' is 'D'; it is one of A, B, C"),
        ({"answer": ""}, "'answer' is ''"),
        ({"B": "nan"}, "line 2: there are 1 options"),
        ({"index": "x"}, "line 2: 'index' is 'x'; it is a whole number"),
        ({"index": 1000000241}, "a rotation with index 1000000241, and no question with index 241"),
        ({"image": "8"}, "line 2: 'image' is '8'; it is an image in base64, or the index of a row"),
        ({"image": "1000241"}, "'image' is '1000241'"),  # a row that has no image itself
        ({"image": "/etc/passwd"}, "'image' is '/etc/passwd'"),
        ({"image": "é" * 100}, "it is an image in base64"),
        ({"image": "A" * 101}, "it is an image in base64"),
    ],
)
def test_what_is_not_in_the_layout_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        mmbench(tmp_path, **change).records()


def test_an_image_that_cannot_be_read_is_named_when_it_is(tmp_path: Path) -> None:
    dataset = BenchmarkDataset(mmbench(tmp_path, image="A" * 100))
    with pytest.raises(
        DataError, match="image of question 1000241, in the row with index 241, cannot be read: its format"
    ):
        dataset[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ("index\tquestion\timage\tA\tB\n", "has no rows"),
        ("index\tquestion\tA\n1\tb\tc\n", "its first line lacks image, B"),
        ("index\tindex\n1\t2\n", "line 1 names a column twice"),
        ("index\tquestion\n1\n", "line 2 has 1 cells, and the first line names 2 columns"),
        ('a\tb\n"1\n2"\t3\n\n4\t5\t6\n', "line 5 has 3 cells"),
    ],
)
def test_a_table_of_another_layout_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text(text)
    with pytest.raises(DataError, match=rf"x\.tsv.*{message}"):
        MMBench(str(tmp_path / "x.tsv")).records()


def test_cells_are_read_as_pandas_writes_them(tmp_path: Path) -> None:
    rows = [["a", "b", "c"], ['say "x"', "tab\there", "two\nlines"], ["", '"', "é"], ['5" wide', "x", ""]]
    path = tmp_path / "x.tsv"
    quoted = [
        ["a", "b", "c"],
        ['"say ""x"""', '"tab\there"', '"two\nlines"'],
        ["", '""""', "é"],
        ['5" wide', "x", '""'],
    ]
    path.write_text("\r\n".join("\t".join(row) for row in quoted).replace("two\n", "two\r\n"), newline="")
    found = read_tsv(str(path), "a table")
    assert [list(row.values()) for _, row in found] == rows[1:]
    assert [where.rpartition(" ")[2] for where, _ in found] == ["2", "4", "5"]
