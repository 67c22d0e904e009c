"""MVBench: questions with options about short videos, in twenty tasks."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from catp_lightning.data.benchmarks.reader import Record, file_name
from catp_lightning.data.benchmarks.references import GroupedChoice
from catp_lightning.data.benchmarks.video_reader import VideoReader
from catp_lightning.data.records import field, numbered, read_json
from catp_lightning.errors import DataError

_FOLDERS: Mapping[str, str] = {
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation",
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos",
    "fine_grained_pose": "nturgbd",
    "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": "clevrer/video_validation",
}
"""Folder of each task's videos, as the authors' evaluation names it; of `episodic_reasoning` folders of frames."""

TASKS = tuple(_FOLDERS)

_IN_PART = ("action_sequence", "action_prediction", "object_interaction", "action_localization", "episodic_reasoning")
"""Tasks that ask about a part of the video, from `start` to `end`."""

_SUPPLEMENT = "data0613"


class MVBench(VideoReader):
    """MVBench (arXiv 2311.17005), questions of 20 tasks with options about short videos.

    The folder has `json`, with a list of questions for each task, `<task>.json`; and `video`, with the videos in the
    folders that the authors' evaluation names (`star/Charades_v1_480`, `tvqa/frames_fps3_hq` and so on), or in the same
    ones under `video/data0613`, their supplement. A record has `video`, `question`, `candidates`, `answer`, which is
    one of the candidates, and in five tasks `start` and `end`, the seconds that are asked about. Tasks without a list
    are left out. A question is asked as its authors ask it: "Question: ...", "Options:", and a line "(A) ..." for each
    candidate.

    Args:
        folder: the folder with these two, as its authors publish it (OpenGVLab/MVBench on the Hugging Face hub).
        frames: frames of each video that the model sees; the authors take 16.
    """

    metric: ClassVar[str] = "mvbench"
    frame_rate: ClassVar[float] = 3.0  # of TVQA's frames

    def __init__(self, folder: str, frames: int = 16) -> None:
        super().__init__(str(Path(folder, "json")), str(Path(folder, "video")), frames)
        self.folder = folder
        self._parts: dict[int, tuple[float, float]] = {}

    def records(self) -> list[Record]:
        there = [task for task in TASKS if os.path.lexists(Path(self.questions, f"{task}.json"))]
        if not there:
            raise DataError(
                f"{self.questions} has no list of questions of MVBench, such as {TASKS[0]}.json. Name the folder that "
                "has 'json' and 'video' in it."
            )
        records: list[Record] = []
        for task in there:
            path = str(Path(self.questions, f"{task}.json"))
            listed = numbered(read_json(path, "a list of MVBench's questions"), path, "a list of MVBench's questions")
            records += [self._record(len(records) + number, task, *found) for number, found in enumerate(listed)]
        return records

    def _record(self, number: int, task: str, where: str, record: Any) -> Record:
        video, question, answer = (
            field(record, name, str, where, "MVBench's") for name in ("video", "question", "answer")
        )
        candidates = field(record, "candidates", list, where, "MVBench's")
        if not 2 <= len(candidates) <= 26 or not all(isinstance(candidate, str) for candidate in candidates):
            raise DataError(f"{where}: 'candidates' must be 2 to 26 texts, got {candidates!r:.200}.")
        if answer not in candidates:
            raise DataError(f"{where}: 'answer' is {answer!r:.200}; it is one of {candidates!r:.200}.")
        if task in _IN_PART:
            self._parts[number] = _part(record, where)
        letters = [chr(ord("A") + place) for place in range(len(candidates))]
        options = [f"({letter}) {candidate}" for letter, candidate in zip(letters, candidates, strict=True)]
        # Of equal candidates the authors' evaluation takes the last.
        right = max(zip(letters, candidates, strict=True), key=lambda pair: (pair[1] == answer, pair[0]))[0]
        return Record(
            number,
            self._place(task, file_name(video, where, "video")),
            "\n".join([f"Question: {question}", "Options:", *options]),
            GroupedChoice(task, right),
            number,
        )

    def part(self, record: Record) -> tuple[float, float] | None:
        return self._parts.get(record.question_id)

    def _place(self, task: str, video: str) -> str:
        """Return where a video is in the folder of videos; where there is none, the first that was sought."""
        place = f"{_FOLDERS[task]}/{video}"
        moved = f"{_SUPPLEMENT}/{place}"
        there = os.path.lexists(Path(self.images, moved)) and not os.path.lexists(Path(self.images, place))
        return moved if there else place


def _part(record: Mapping[str, Any], where: str) -> tuple[float, float]:
    seconds = []
    for name in ("start", "end"):
        value = record.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 10**6:
            raise DataError(f"{where}: {name!r} is {value!r:.80}; it is a number of seconds, from 0 to a million.")
        seconds.append(float(value))
    if seconds[0] > seconds[1]:
        raise DataError(f"{where}: 'start' is {seconds[0]} and 'end' {seconds[1]}; the end is the later.")
    return seconds[0], seconds[1]
