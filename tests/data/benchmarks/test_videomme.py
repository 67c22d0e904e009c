"""Questions of Video-MME, in the layout of the authors' JSON and in that of their table."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from catp_lightning.data.benchmarks import BenchmarkDataset, VideoMME
from catp_lightning.errors import DataError
from tests.support.benchmark_videos import videomme
from tests.support.video_files import frames_of, write_video


def test_questions_are_asked_with_their_choices_and_videos_found_by_either_name(tmp_path: Path) -> None:
    records = videomme(tmp_path).records()
    assert [record.question_id for record in records] == [0, 1, 2, 3]
    assert records[0].text == "How many jars are there in video 001?\nA. 4.\nB. 9.\nC. 5.\nD. 13."
    assert [(record.image, *record.reference) for record in records] == [
        ("fFjv93ACGo8", "short", "B"),
        ("fFjv93ACGo8", "short", "C"),
        ("301", "medium", "B"),
        ("301", "medium", "D"),
    ]


def test_rows_of_the_table_are_read_as_well(tmp_path: Path) -> None:
    reader = videomme(tmp_path)
    videos = json.loads(Path(reader.questions).read_text())
    rows = [
        {
            "video_id": video["video_id"],
            "duration": video["duration_category"],
            "domain": "Knowledge",
            "sub_category": "Humanity & History",
            "url": video["url"],
            "videoID": ("fFjv93ACGo8", "301")[number],
            "question_id": question["question_id"],
            "task_type": question["task_type"],
            "question": question["question"],
            "options": question["choices"],
            "answer": question["answer"],
        }
        for number, video in enumerate(videos)
        for question in video["questions"]
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert VideoMME(str(tmp_path / "rows.json"), reader.images).records() == reader.records()


def test_frames_of_a_video_file_are_read_in_the_place_of_a_folder(tmp_path: Path) -> None:
    reader = videomme(tmp_path, frames=4)
    (tmp_path / "data/301").rename(tmp_path / "301")
    write_video(tmp_path / "data" / "301.mkv", frames=40)
    clip = BenchmarkDataset(reader)[3]["clip"]
    assert clip.numbers == frames_of(clip.frames) == [4, 14, 24, 33]
    assert (clip.total, clip.rate) == (40, 10.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ["A. 4."]}, "'choices' must be 4 texts"),
        ({"choices": ["A. 4.", "B. 9.", "C. 5.", 13]}, "'choices' must be 4 texts"),
        ({"answer": "E"}, "'answer' is 'E'; it is one of A, B, C, D"),
        ({"question": None}, "'question' must be str, got None"),
    ],
)
def test_what_is_not_in_the_layout_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"Video-MME\.json, record number 0, record number 1.*{message}"):
        videomme(tmp_path, **change).records()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_id": "../secret", "url": None}, r"names the video '\.\./secret'"),
        ({"video_id": 301}, "'video_id' must be str, got 301"),
        ({"duration_category": "hour"}, "the duration is 'hour'; it is one of short, medium, long"),
        ({"questions": []}, "a video's questions: that is a list that is not empty"),
        ({"questions": {"question": "?"}}, "a video's questions: that is a list"),
    ],
)
def test_videos_that_are_not_in_the_layout_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    reader = videomme(tmp_path)
    videos = json.loads(Path(reader.questions).read_text())
    videos[1].update(change)
    Path(reader.questions).write_text(json.dumps(videos))
    with pytest.raises(DataError, match=rf"Video-MME\.json, record number 1.*{message}"):
        reader.records()


def test_a_damaged_video_is_named_with_its_question(tmp_path: Path) -> None:
    reader = videomme(tmp_path, frames=2)
    (tmp_path / "data/301").rename(tmp_path / "301")
    video = write_video(tmp_path / "data" / "301.mp4", frames=30)
    dataset = BenchmarkDataset(reader)
    assert dataset[3]["clip"].total == 30
    video.write_bytes(video.read_bytes()[:900])
    with pytest.raises(DataError, match=r"301\.mp4, the video of question 3, cannot be read: .*Replace the file"):
        dataset[3]
    write_video(tmp_path / "outside.mp4")
    video.unlink()
    video.symlink_to(tmp_path / "outside.mp4")
    with pytest.raises(DataError, match=r"301\.mp4, the video of question 3, .*outside the folder of videos"):
        dataset[3]
    with pytest.raises(DataError, match=r"1 of 2 video files of .* lie outside videos="):
        BenchmarkDataset(reader)


def test_without_pyav_video_files_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = videomme(tmp_path)
    monkeypatch.setitem(sys.modules, "av", None)
    assert len(BenchmarkDataset(reader)) == 4, "folders of frames need no PyAV"
    (tmp_path / "data/301").rename(tmp_path / "301")
    (tmp_path / "data/301.mp4").write_bytes(b"a video")
    with pytest.raises(DataError, match=r"PyAV, which cannot be imported: .*pip install 'catp-lightning\[video\]'"):
        BenchmarkDataset(reader)
