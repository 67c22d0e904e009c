"""Questions of MVBench, in the layout of the authors' files."""

import os
from pathlib import Path
from typing import Any

import pytest

from catp_lightning.data.benchmarks import BenchmarkDataset, MVBench
from catp_lightning.data.benchmarks.mvbench import TASKS
from catp_lightning.data.images import read_image
from catp_lightning.errors import DataError
from tests.support.benchmark_videos import mvbench


def test_questions_are_asked_as_the_authors_ask_them_task_by_task(tmp_path: Path) -> None:
    reader = mvbench(tmp_path)
    records = reader.records()
    assert [record.question_id for record in records] == [0, 1, 2, 3]
    assert records[0].text == (
        "Question: What happened after the person took the food?\nOptions:\n(A) Ate the medicine.\n"
        "(B) Tidied up the blanket.\n(C) Put down the cup.\n(D) Took the box."
    )
    found = [(record.image, *record.reference, reader.part(record)) for record in records]
    assert found == [
        ("star/Charades_v1_480/ZS9XR", "action_sequence", "A", (0.3, 1.2)),
        ("star/Charades_v1_480/ZS9XR", "action_sequence", "D", (0.3, 1.2)),
        ("clevrer/video_validation/video_10009", "moving_count", "B", None),
        ("tvqa/frames_fps3_hq/castle_s07e15_seg02_clip_15", "episodic_reasoning", "A", (1.0, 3.2)),
    ]
    assert len(TASKS) == 20


def test_of_equal_candidates_the_last_is_right(tmp_path: Path) -> None:
    records = mvbench(tmp_path, candidates=["no", "yes", "no", "dog"], answer="no").records()
    assert records[1].reference.answer == "C"


def test_frames_are_the_middles_of_equal_stretches_of_the_part(tmp_path: Path) -> None:
    dataset = BenchmarkDataset(mvbench(tmp_path, frames=4))
    whole, part = dataset[2]["clip"], dataset[3]["clip"]
    assert whole.numbers == [0, 1, 2, 2] and (whole.total, whole.rate) == (4, 3.0)
    # Seconds 1.0 to 3.2 are the frames 3 to 10, which the authors count from 1: of them 3, 5, 7 and 8.
    assert part.numbers == [0, 2, 4, 5] and part.total == 8
    folder = tmp_path / "video/tvqa/frames_fps3_hq/castle_s07e15_seg02_clip_15"
    expected = [read_image(folder / f"{number:05d}.jpg").tobytes() for number in (3, 5, 7, 8)]
    assert [frame.tobytes() for frame in part.frames] == expected
    assert [dataset[number]["image_id"] for number in range(4)] == [0, 0, 1, 2]


def test_frames_of_folders_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    reader = mvbench(tmp_path, frames=12)
    folder = tmp_path / "video/clevrer/video_validation/video_10009"
    expected = [frame.tobytes() for frame in reader.visual(reader.records()[2])["clip"].frames]
    for number in range(1, 5):
        (folder / f"{number:05d}.jpg").rename(folder / f"{(3, 9, 10, 110)[number - 1]}.jpg")
    (folder / "notes.txt").write_text("not a frame")
    assert [frame.tobytes() for frame in reader.visual(reader.records()[2])["clip"].frames] == expected


def test_the_supplement_is_looked_through_as_well(tmp_path: Path) -> None:
    reader = mvbench(tmp_path)
    place = tmp_path / "video/data0613/clevrer/video_validation"
    place.mkdir(parents=True)
    (tmp_path / "video/clevrer/video_validation/video_10009").rename(place / "video_10009")
    assert reader.records()[2].image == "data0613/clevrer/video_validation/video_10009"
    assert len(BenchmarkDataset(reader)) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": ["no"]}, "'candidates' must be 2 to 26 texts"),
        ({"candidates": ["no", 2]}, "'candidates' must be 2 to 26 texts"),
        ({"candidates": None}, "'candidates' must be list, got None"),
        ({"answer": "Took the cat."}, r"'answer' is 'Took the cat\.'; it is one of"),
        ({"video": 7}, "'video' must be str, got 7"),
        ({"video": "../secret"}, r"names the video '\.\./secret'\. That is a path in the folder of videos"),
        ({"video": "/etc"}, "names the video '/etc'"),
        ({"start": None}, "'start' is None; it is a number of seconds"),
        ({"start": True}, "'start' is True"),
        ({"end": float("nan")}, "'end' is nan"),
        ({"end": 10**400}, "'end' is 1000.*it is a number of seconds, from 0 to a million"),
        ({"start": 3.0}, r"'start' is 3\.0 and 'end' 1\.2; the end is the later"),
    ],
)
def test_what_is_not_in_the_layout_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"action_sequence\.json, record number 1.*{message}"):
        mvbench(tmp_path, **change).records()


def test_a_folder_without_lists_and_a_number_of_frames_that_is_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no list of questions of MVBench, such as action_sequence\.json"):
        MVBench(str(tmp_path)).records()
    for frames in (0, -1, 1025):
        with pytest.raises(DataError, match=f"frames is {frames}; it is a number of frames of each video, from 1 to"):
            MVBench(str(tmp_path), frames=frames)


def test_videos_that_are_missing_or_outside_are_refused(tmp_path: Path) -> None:
    reader = mvbench(tmp_path)
    place = tmp_path / "video/clevrer/video_validation/video_10009"
    place.rename(tmp_path / "outside")
    with pytest.raises(DataError, match=r"1 of 3 video files of .*json are missing: .*video_10009 \(question 2\)"):
        BenchmarkDataset(reader)
    place.symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match=r"1 of 3 video files of .* lie outside videos=.*Only files inside"):
        BenchmarkDataset(reader)


def test_frames_that_are_missing_damaged_or_outside_are_refused(tmp_path: Path) -> None:
    reader = mvbench(tmp_path)
    dataset = BenchmarkDataset(reader)
    folder = tmp_path / "video/clevrer/video_validation/video_10009"
    frame = folder / "00002.jpg"
    frame.rename(tmp_path / "outside.jpg")
    frame.symlink_to(tmp_path / "outside.jpg")
    with pytest.raises(DataError, match=r"00002\.jpg, the image of question 2, cannot be read: it lies outside"):
        dataset[2]
    frame.unlink()
    frame.symlink_to(tmp_path / "video/tvqa/frames_fps3_hq/castle_s07e15_seg02_clip_15/00003.jpg")
    assert dataset[2]["clip"].total == 4, "a link within the folder of videos is followed"
    frame.unlink()
    frame.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"00002\.jpg, the image of question 2, cannot be read"):
        dataset[2]
    for name in os.listdir(folder):
        (folder / name).unlink()
    with pytest.raises(DataError, match=r"video_10009, the video of question 2, cannot .* there is no frame in that"):
        dataset[2]


def test_a_part_after_the_end_of_its_video_is_refused(tmp_path: Path) -> None:
    dataset = BenchmarkDataset(mvbench(tmp_path, start=5, end=7))
    with pytest.raises(DataError, match=r"ZS9XR, the video of question 1, .*there is none between \(5\.0, 7\.0\)"):
        dataset[1]
