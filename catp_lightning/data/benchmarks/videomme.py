"""Video-MME: questions with four options about short, medium and long videos."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from catp_lightning.data.benchmarks.reader import Record, file_name
from catp_lightning.data.benchmarks.references import GroupedChoice
from catp_lightning.data.benchmarks.video_reader import VideoReader
from catp_lightning.data.records import field, numbered, read_json
from catp_lightning.errors import DataError

DURATIONS = ("short", "medium", "long")

_SUFFIXES = (".mp4", ".MP4", ".mkv")


class VideoMME(VideoReader):
    """Video-MME (arXiv 2405.21075), without subtitles: three questions about each of 900 videos.

    The file is the authors' JSON, the same that their scorer reads: a list of videos with `video_id`,
    `duration_category` ("short", "medium" or "long") and `questions`, each with `question`, four `choices` ("A. ...")
    and `answer`, a letter. The rows of their table on the Hugging Face hub as a list of records are read too: these
    have `videoID`, `duration`, `question`, `options` and `answer`. A video is `<name>.mp4` or `<name>.mkv`, or a folder
    of that name with frames; the name is `videoID`, YouTube's id in `url`, or `video_id`.

    Args:
        questions: the JSON file, from https://github.com/BradyFU/Video-MME.
        videos: the folder of the videos.
        frames: frames of each video that the model sees.
    """

    metric: ClassVar[str] = "videomme"

    def __init__(self, questions: str, videos: str, frames: int = 16) -> None:
        super().__init__(questions, videos, frames)

    def records(self) -> list[Record]:
        holds = "a list of Video-MME's videos with their questions"
        listed = numbered(read_json(self.questions, holds), self.questions, holds)
        asked = [found for where, record in listed for found in _asked(record, where)]
        places = {names: self._place(names) for names in dict.fromkeys(found.names for found in asked)}
        return [
            Record(number, places[found.names], "\n".join([found.text, *found.choices]), found.reference, number)
            for number, found in enumerate(asked)
        ]

    def _place(self, names: tuple[str, ...]) -> str:
        """Return which of a video's names is in the folder, as a file or a folder; where none is, the first."""
        sought = [f"{name}{suffix}" for name in names for suffix in (*_SUFFIXES, "")]
        return next((place for place in sought if os.path.lexists(Path(self.images, place))), sought[0])


class _Asked(NamedTuple):
    names: tuple[str, ...]  # of the video
    text: str
    choices: list[str]
    reference: GroupedChoice


def _asked(record: Any, where: str) -> Iterator[_Asked]:
    """Yield the questions of a record, which is a video or a row of the table."""
    if isinstance(record, Mapping) and "videoID" in record:
        name, duration = (field(record, key, str, where, "Video-MME's") for key in ("videoID", "duration"))
        yield _question(record, "options", where, (name,), duration)
        return
    name, duration = (field(record, key, str, where, "Video-MME's") for key in ("video_id", "duration_category"))
    url = record.get("url")
    ids = re.findall(r"[?&]v=([\w-]+)", url) if isinstance(url, str) else []
    for place, question in numbered(record.get("questions"), where, "a video's questions"):
        yield _question(question, "choices", place, (*ids[:1], name), duration)


def _question(question: Any, options: str, where: str, names: tuple[str, ...], duration: str) -> _Asked:
    choices = field(question, options, list, where, "Video-MME's")
    if len(choices) != 4 or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{where}: {options!r} must be 4 texts, got {choices!r:.200}.")
    text, answer = (field(question, name, str, where, "Video-MME's") for name in ("question", "answer"))
    if answer not in tuple("ABCD"):
        raise DataError(f"{where}: 'answer' is {answer!r:.80}; it is one of A, B, C, D.")
    if duration not in DURATIONS:
        raise DataError(f"{where}: the duration is {duration!r:.80}; it is one of {', '.join(DURATIONS)}.")
    named = tuple(file_name(name, where, "video") for name in names)
    return _Asked(named, text, choices, GroupedChoice(duration, answer))
