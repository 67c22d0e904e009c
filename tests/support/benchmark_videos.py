"""Small data sets of videos in the layouts of the official files; the videos are folders of frames."""

from pathlib import Path
from typing import Any

from catp_lightning.data.benchmarks import MVBench, VideoMME
from tests.support.benchmark_writing import write_images, write_json


def write_frames(folder: Path, count: int, first: int = 0) -> Path:
    """So many frames, `00001.jpg` and so on, those of the seeds from `first` on."""
    write_images(folder, [f"{number:05d}.jpg" for number in range(1, count + 1)], first)
    return folder


def mvbench(folder: Path, frames: int = 1, **change: Any) -> MVBench:
    """Four questions of three tasks about three videos; `change` replaces fields of the second."""
    videos = folder / "video"
    for number, place in enumerate(("star/Charades_v1_480/ZS9XR", "clevrer/video_validation/video_10009")):
        write_frames(videos / place, 4, 10 * number)
    write_frames(videos / "tvqa/frames_fps3_hq/castle_s07e15_seg02_clip_15", 12, 20)
    sequence: list[dict[str, Any]] = [
        {
            "video": "ZS9XR",
            "question": f"What happened {when} the person took the food?",
            "candidates": ["Ate the medicine.", "Tidied up the blanket.", "Put down the cup.", "Took the box."],
            "answer": answer,
            "question_id": f"Sequence_T1_{number}",
            "start": 0.3,
            "end": 1.2,
        }
        for number, (when, answer) in enumerate((("after", "Ate the medicine."), ("before", "Took the box.")))
    ]
    sequence[1].update(change)
    count = {"video": "video_10009", "question": "How many?", "candidates": ["3", "2", "4"], "answer": "2"}
    episode = {
        "video": "castle_s07e15_seg02_clip_15",
        "question": "Why is Castle sad?",
        "candidates": ["He lost.", "He won."],
        "answer": "He lost.",
        "start": 1.0,
        "end": 3.2,
    }
    for task, listed in (
        ("action_sequence", sequence),
        ("moving_count", [count]),
        ("episodic_reasoning", [episode]),
    ):
        write_json(folder / "json" / f"{task}.json", listed)
    return MVBench(str(folder), frames=frames)


def videomme(folder: Path, frames: int = 1, **change: Any) -> VideoMME:
    """Four questions about two videos, found by YouTube's id and by their number; `change` replaces the second's."""
    for number, name in enumerate(("fFjv93ACGo8", "301")):
        write_frames(folder / "data" / name, 5, 10 * number)
    questions: list[dict[str, Any]] = [
        {
            "question_id": f"{video}-{number}",
            "task_type": "Counting Problem",
            "question": f"How many jars are there in video {video}?",
            "choices": ["A. 4.", "B. 9.", "C. 5.", "D. 13."],
            "answer": "ABCD"[number],
        }
        for video, number in (("001", 1), ("001", 2), ("301", 1), ("301", 3))
    ]
    questions[1].update(change)
    videos = [
        {
            "video_id": name,
            "duration_category": duration,
            "video_category": "Knowledge",
            "video_subcategory": "Humanity & History",
            "url": url,
            "questions": asked,
        }
        for name, duration, url, asked in (
            ("001", "short", "https://www.youtube.com/watch?v=fFjv93ACGo8", questions[:2]),
            ("301", "medium", "https://www.youtube.com/watch?v=LRAWsLUqNlw", questions[2:]),
        )
    ]
    return VideoMME(write_json(folder / "Video-MME.json", videos), str(folder / "data"), frames=frames)
