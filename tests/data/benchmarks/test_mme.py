"""Questions of MME, in the layout of the authors' folders."""

from pathlib import Path

import pytest

from catp_lightning.data.benchmarks import MME, BenchmarkDataset
from catp_lightning.errors import DataError
from tests.support.benchmark_tasks import mme


def test_two_questions_are_read_about_each_image(tmp_path: Path) -> None:
    records = mme(tmp_path).records()
    assert [record.question_id for record in records] == list(range(6))
    assert [record.group for record in records] == [0, 0, 1, 1, 2, 2]
    assert records[0].text == "Is there a bus? Please answer yes or no."
    assert records[0].reference == (0, 0, "existence", "yes") and records[1].reference == (1, 0, "existence", "no")
    assert records[3].image == "existence/000000007816.png"
    assert records[5] == (5, "artwork/images/10002.jpg", "Is it glassware?", (5, 2, "artwork", "no"), 2)


def test_a_share_of_the_questions_keeps_both_about_an_image(tmp_path: Path) -> None:
    reader = mme(tmp_path)
    drawn = {tuple(r.question_id for r in BenchmarkDataset(reader, 1 / 3, seed).records) for seed in range(20)}
    assert drawn == {(0, 1), (2, 3), (4, 5)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Is it?\tYes\n", "has 1 questions; MME's score is of two"),
        ("Is it?\tYes\n" * 3, "has 3 questions"),
        ("Is it? Yes\nIs it?\tNo\n", "question 1 is 'Is it[?] Yes'; it is a question, a tab, and 'Yes' or 'No'"),
        ("Is it?\tYes\nIs it?\tMaybe\n", "question 2 is"),
    ],
)
def test_what_is_not_in_the_layout_is_named(text: str, message: str, tmp_path: Path) -> None:
    reader = mme(tmp_path)
    Path(reader.folder, "existence/000000007816.txt").write_text(text)
    with pytest.raises(DataError, match=rf"000000007816\.txt.*{message}"):
        reader.records()


def test_an_image_that_is_missing_is_named(tmp_path: Path) -> None:
    reader = mme(tmp_path)
    Path(reader.folder, "artwork/images/10002.jpg").unlink()
    with pytest.raises(
        DataError, match=r"1 of 3 image files .* are missing: .*artwork/images/10002\.jpg \(question 4\)"
    ):
        BenchmarkDataset(reader)


def test_a_folder_without_subtasks_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="has no texts in the folder of a subtask of MME: existence, count"):
            MME(str(folder)).records()


@pytest.mark.parametrize("link", ["text", "folder", "image"])
def test_links_out_of_the_folder_are_refused(link: str, tmp_path: Path) -> None:
    reader = mme(tmp_path)
    name = {"text": "existence/000000006040.txt", "folder": "artwork", "image": "existence/000000006040.jpg"}[link]
    place = Path(reader.folder, name)
    place.rename(tmp_path / "outside")
    place.symlink_to(tmp_path / "outside")
    message = "lie outside images=" if link == "image" else "leads out of .*only files inside are read"
    with pytest.raises(DataError, match=message):
        BenchmarkDataset(reader)
