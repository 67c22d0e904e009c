"""What holds for every reader: whole files, images inside their folder, and shares of the questions."""

import os
from pathlib import Path
from typing import Any

import pytest

from catp_lightning.data.benchmarks import MME, POPE, BenchmarkDataModule, BenchmarkDataset, MVBench, Reader
from catp_lightning.errors import DataError
from catp_lightning.metrics.benchmarks import BENCHMARKS
from tests.support.benchmark_files import DATA_SETS, pope
from tests.support.benchmark_writing import write_lines

every_data_set = pytest.mark.parametrize("name", DATA_SETS)


def file_of(reader: Reader) -> Path:
    place = Path(reader.questions)
    within = {MME: "existence/000000006040.txt", MVBench: "moving_count.json"}
    return place / within.get(type(reader), "")


@every_data_set
def test_every_reader_names_its_metric(name: str, tmp_path: Path) -> None:
    assert DATA_SETS[name](tmp_path).metric == name
    assert set(BENCHMARKS) == set(DATA_SETS)


@every_data_set
def test_images_are_read_when_their_item_is(name: str, tmp_path: Path) -> None:
    dataset = BenchmarkDataset(DATA_SETS[name](tmp_path))
    assert len(dataset) >= 3
    for number in range(len(dataset)):
        example = dataset[number]
        image = example["clip"].frames[0] if "clip" in example else example["image"]
        assert image.size == (32, 24) and image.mode == "RGB"
        assert example["question"] and "reference" in example
    numbers = [dataset[number]["image_id"] for number in range(len(dataset))]
    assert list(dict.fromkeys(numbers)) == list(range(max(numbers) + 1))


@pytest.mark.parametrize("name", [name for name in DATA_SETS if name not in ("mme", "mvbench")])
def test_a_missing_file_is_named_at_setup(name: str, tmp_path: Path, processor: str) -> None:
    reader = DATA_SETS[name](tmp_path)
    place = file_of(reader)
    place.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=f"{place.name}.*there is no such file"):
        BenchmarkDataModule(processor, test=reader).setup("test")


@every_data_set
def test_a_file_that_is_cut_off_or_no_text_is_refused(name: str, tmp_path: Path) -> None:
    reader = DATA_SETS[name](tmp_path)
    place = file_of(reader)
    whole = place.read_bytes()
    for content in (whole[: len(whole) // 2], b"\xff\xfe\x00" + whole, b"", b"[" * 100_000):
        place.write_bytes(content)
        with pytest.raises(DataError, match=place.name):
            BenchmarkDataset(reader)


@pytest.mark.parametrize(
    "way", ["../secret.png", "a/../../secret.png", "{}/secret.png", "C:\\secret.png", "..\\secret.png", "", "a\0b"]
)
def test_a_name_that_leaves_the_folder_of_images_is_refused(way: str, tmp_path: Path) -> None:
    reader = pope(tmp_path, image=way.format(tmp_path))
    with pytest.raises(DataError, match=r"coco_pope_random\.json, line 2 names the image .* without '\.\.'"):
        BenchmarkDataset(reader)


@pytest.mark.parametrize("link", ["file", "folder"])
def test_a_link_that_leaves_the_folder_of_images_is_refused(link: str, tmp_path: Path) -> None:
    reader = pope(tmp_path, image="7.png" if link == "file" else "sub/7.png")
    outside = tmp_path / "outside"
    outside.mkdir()
    Path(reader.images, "COCO_val2014_000000000000.jpg").rename(outside / "7.png")
    Path(reader.images, "7.png" if link == "file" else "sub").symlink_to(
        outside / "7.png" if link == "file" else outside
    )
    with pytest.raises(DataError, match=r"1 of 4 image files .* lie outside images=.*Only files inside"):
        BenchmarkDataset(reader)


def test_a_link_that_is_put_in_place_later_is_refused_when_it_is_read(tmp_path: Path) -> None:
    dataset = BenchmarkDataset(pope(tmp_path))
    place = Path(dataset.reader.image_path(dataset.records[0]))
    place.rename(tmp_path / "outside.png")
    place.symlink_to(tmp_path / "outside.png")
    with pytest.raises(DataError, match="it lies outside the folder of images"):
        dataset[0]


def test_missing_images_are_counted_and_the_first_named(tmp_path: Path) -> None:
    reader = pope(tmp_path)
    for name in sorted(os.listdir(reader.images))[1:]:
        Path(reader.images, name).unlink()
    with pytest.raises(DataError, match=r"2 of 3 image files of .*000000000001\.jpg \(question 3\), .*\(question 5\)"):
        BenchmarkDataset(reader)


def test_a_damaged_image_is_named_with_its_question(tmp_path: Path) -> None:
    dataset = BenchmarkDataset(pope(tmp_path))
    Path(dataset.reader.image_path(dataset.records[2])).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"000000000001\.jpg, the image of question 3, cannot be read"):
        dataset[2]


def test_an_id_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="question id 1 is there twice"):
        BenchmarkDataset(pope(tmp_path, question_id=1))


class WithoutAnswers(POPE):
    """POPE of which the first questions have no label."""

    unanswered = 2

    def records(self) -> list[Any]:
        found = super().records()
        return [record._replace(reference=None) for record in found[: self.unanswered]] + found[self.unanswered :]


def test_all_questions_have_answers_or_none(tmp_path: Path) -> None:
    whole = pope(tmp_path)
    reader = WithoutAnswers(whole.questions, whole.images)
    with pytest.raises(DataError, match="2 of 6 questions have no answer, the first with id 1"):
        BenchmarkDataset(reader)
    reader.unanswered = 6
    assert "reference" not in BenchmarkDataset(reader)[0]


class InPairs(POPE):
    """POPE whose questions about an image are judged together."""

    def records(self) -> list[Any]:
        return [record._replace(group=(record.question_id - 1) // 2) for record in super().records()]


@pytest.mark.parametrize(("kind", "ids"), [(POPE, 2), (InPairs, 2)])
def test_a_share_of_the_questions_keeps_groups_whole_and_is_drawn_by_the_seed(
    kind: type[POPE], ids: int, tmp_path: Path
) -> None:
    whole = pope(tmp_path)
    reader = kind(whole.questions, whole.images)
    drawn = {tuple(r.question_id for r in BenchmarkDataset(reader, 1 / 3, seed).records) for seed in range(20)}
    assert all(len(found) == ids for found in drawn) and len(drawn) > 2
    if kind is InPairs:
        assert drawn == {(1, 2), (3, 4), (5, 6)}
    again = [BenchmarkDataset(reader, 1 / 3, 5).records for _ in range(2)]
    assert again[0] == again[1]


def test_a_share_of_the_questions_does_not_renumber_images(tmp_path: Path) -> None:
    reader = pope(tmp_path)
    whole = BenchmarkDataset(reader)
    numbers = dict(zip((record.image for record in whole.records), whole.image_ids, strict=True))
    some = BenchmarkDataset(reader, 0.4, seed=3)
    assert some.image_ids == [numbers[record.image] for record in some.records]


def test_a_split_that_was_not_given_is_asked_for_by_name(processor: str, tmp_path: Path) -> None:
    data = BenchmarkDataModule(processor, test=pope(tmp_path))
    with pytest.raises(DataError, match=r"There is no val split: give BenchmarkDataModule\(val=POPE\(\.\.\.\)\)"):
        data.val_dataloader()


def test_a_byte_order_mark_and_carriage_returns_are_not_part_of_the_text(tmp_path: Path) -> None:
    reader = pope(tmp_path)
    records = reader.records()
    place = file_of(reader)
    place.write_bytes(b"\xef\xbb\xbf" + place.read_bytes().replace(b"\n", b"\r\n"))
    assert reader.records() == records


def test_lines_are_counted_as_an_editor_counts_them(tmp_path: Path) -> None:
    place = tmp_path / "pope.json"
    write_lines(place, [{"question_id": 1, "image": "a.jpg", "text": "Is there\u2028a dog?", "label": "no"}])
    text = place.read_text()
    place.write_text(f"\n{text}\n{text[:20]}\n")
    with pytest.raises(DataError, match=r"pope\.json, line 4 is not valid JSON"):
        POPE(str(place), str(tmp_path)).records()
