"""Read frames of video files: files of a foreign data set may be damaged or malicious."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from catp_lightning.data.images import MAX_PIXELS, check_shape
from catp_lightning.errors import DataError

if TYPE_CHECKING:
    import av

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif"
"""FFmpeg's names of the containers that are read, told by a file's content. It knows three hundred more, some of which
are lists of other files and of addresses."""

MAX_PACKETS = 2**21
"""Limit on the packets of a file, frames and sound: ten hours."""

MAX_DECODED = 2**38
"""Limit on the pixels that are decoded for the frames of a question: half an hour of work. Frames between a key frame
and the one that is wanted have to be decoded too; two minutes of them at 1920 x 1080 are 2**33 pixels."""

FRAME_PIXELS = 2**21
"""Limit on the pixels of a returned frame, 6 MiB as RGB: 1920 x 1080 has fewer."""

_TOLERANCE = 0.05  # share of a file's length that may be missing at its end, beside a second


@dataclass(frozen=True)
class Clip:
    """Frames of a video, or of a part of it, in their order.

    Attributes:
        frames: images, RGB, of at most `FRAME_PIXELS` pixels.
        numbers: number of each frame in the part, from 0; not falling. A number is there again where there are fewer.
        total: number of frames that the part has.
        rate: frames a second.
    """

    frames: list[Image.Image]
    numbers: list[int]
    total: int
    rate: float


def sampled(count: int, first: int, last: int) -> list[int]:
    """Return so many numbers from `first` to `last`, the middles of equal stretches, as MVBench's authors take them.

    >>> sampled(4, 0, 99), sampled(3, 5, 6)
    ([12, 37, 62, 86], [5, 5, 6])
    """
    stretch = (last - first) / count
    return [int(first + stretch / 2 + round(stretch * number)) for number in range(count)]


def numbers_in(
    count: int, total: int, rate: float, part: tuple[float, float] | None, start: int = 0
) -> tuple[list[int], int, int]:
    """Return numbers of frames to take from a video or part of it, and the part's first and last frame, from 0.

    Args:
        count: how many.
        total: frames of the video.
        rate: frames a second.
        part: seconds where the part begins and ends; None: all of the video.
        start: number that the first frame has where seconds are multiplied by the rate.

    Raises:
        OSError: the part begins after the video's end.
    """
    first, last = 0, total - 1
    if part is not None:
        first = max(round(part[0] * rate) - start, 0)
        last = min(round(part[1] * rate) - start, last)
    if first > last:
        raise OSError(f"it has {total} frames, {total / rate:.1f} seconds; there is none between {part} seconds")
    return sampled(count, first, last), first, last


def require_av() -> None:
    """Raise DataError unless PyAV is there, which reads video files."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"Video files are read with PyAV, which cannot be imported: {error}. Install it: "
            "pip install 'catp-lightning[video]'. Folders of frames are read without it."
        ) from error


def read_video(path: Path, count: int, part: tuple[float, float] | None = None, max_pixels: int = MAX_PIXELS) -> Clip:
    """Return frames of a video file, RGB and upright as it says, at most `FRAME_PIXELS` pixels each.

    The file's packets are counted first, without decoding, so that what its header says of their number is not needed.

    Args:
        path: path of a regular file.
        count: how many frames: the middles of so many equal stretches (`sampled`).
        part: seconds where the part begins and ends that they are taken from; None: all of the video.
        max_pixels: limit on the pixels of a frame; `PIL.Image.MAX_IMAGE_PIXELS` holds as well.

    Raises:
        Exception: of any type, for a file that is damaged. One that this function refuses is an OSError that says what
            is allowed.
    """
    import av

    if not path.is_file():  # opening a pipe would wait for ever
        raise OSError("it is neither a file nor a folder of frames")
    most = min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels)
    options = {"max_pixels": str(most)}  # whatever the header says, and at every change within the file
    # The file is handed over open, and no protocol is allowed: FFmpeg has no way to any other file.
    allowed = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
    with open(path, "rb") as file, av.open(file, options=options, container_options=allowed) as container:
        stream = container.streams.best("video")
        if stream is None:
            raise OSError("there is no video in it")
        stream.codec_context.options = options
        stream.codec_context.thread_count = 1  # data loaders have processes
        index = _Index.of(container, stream)
        numbers, first, last = numbers_in(count, len(index.places), index.rate, part)
        wanted = [index.places[number] for number in numbers]
        found = _frames(container, stream, index, wanted, most)
    return Clip([found[place] for place in wanted], [n - first for n in numbers], last - first + 1, index.rate)


@dataclass(frozen=True)
class _Index:
    """Where a stream's frames are.

    Attributes:
        places: time of each frame in the stream's unit, rising; where the file has no times, the frame's number.
        keys: those that can be decoded without the ones before; the first always is among them.
        timed: True if places are times.
        rate: frames a second.
    """

    places: list[int]
    keys: list[int]
    timed: bool
    rate: float

    @classmethod
    def of(cls, container: "av.container.InputContainer", stream: "av.VideoStream") -> "_Index":
        """Read all packets of a file."""
        places: list[int | None] = []
        keys: list[int] = []
        end = 0.0
        for number, packet in enumerate(container.demux()):
            if number >= MAX_PACKETS:
                raise OSError(f"it has more than {MAX_PACKETS:,} packets, ten hours of frames and sound")
            time = packet.dts if packet.pts is None else packet.pts
            if time is not None:
                end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index == stream.index and packet.size and not packet.is_discard:
                places.append(packet.pts)
                if packet.is_keyframe and packet.pts is not None:
                    keys.append(packet.pts)
        if not places:
            raise OSError("there is no frame in it")
        _check_whole(container, end)
        times = sorted({place for place in places if place is not None})
        timed = None not in places and container.format.name != "avi"  # whose frames have none: FFmpeg's are guesses
        rate = float(stream.average_rate or 0)
        if not timed:
            times, keys = list(range(len(places))), []
        elif not rate and times[-1] > times[0]:
            rate = float((len(times) - 1) / ((times[-1] - times[0]) * (stream.time_base or Fraction(1))))
        return cls(times, sorted({times[0], *keys}), timed, rate or 1.0)


def _check_whole(container: "av.container.InputContainer", end: float) -> None:
    """Raise OSError if the packets of a file end, at so many seconds, long before the length in its header."""
    length = (container.duration or 0) / 10**6
    end -= (container.start_time or 0) / 10**6
    if end < length * (1 - _TOLERANCE) - 1:
        raise OSError(f"it ends after {end:.1f} of {length:.1f} seconds; it was not copied completely")


def _frames(
    container: "av.container.InputContainer",
    stream: "av.VideoStream",
    index: _Index,
    wanted: Sequence[int],
    max_pixels: int,
) -> dict[int, Image.Image]:
    """Return the frames at some places; a place without a frame has the next one, or where there is none the last."""
    found: dict[int, Image.Image] = {}
    frames: Iterator[tuple[int, av.VideoFrame]] = iter(())
    frame: av.VideoFrame | None = None
    reached, pixels = index.places[0] - 1, 0
    for place in sorted(set(wanted)):
        key = index.keys[max(0, bisect_right(index.keys, place) - 1)]
        if key > reached:  # nothing before that key frame is needed
            container.seek(key if index.timed else 0, stream=stream)
            frames, frame = _decoded(container, stream, index.timed), None
        while (frame is None or reached < place) and (step := next(frames, None)) is not None:
            reached, frame = step
            pixels += frame.width * frame.height
            if pixels > MAX_DECODED:
                raise OSError(f"more than {MAX_DECODED:,} pixels would have to be decoded; give it more key frames")
        if frame is None or frame.is_corrupt:
            raise OSError(f"its frame at {place} x {stream.time_base} seconds is damaged")
        found[place] = _upright(frame, max_pixels)
    return found


def _decoded(
    container: "av.container.InputContainer", stream: "av.VideoStream", timed: bool
) -> Iterator[tuple[int, "av.VideoFrame"]]:
    for number, frame in enumerate(container.decode(stream)):
        if not timed:
            yield number, frame
        elif frame.pts is not None:
            yield frame.pts, frame


def _upright(frame: "av.VideoFrame", max_pixels: int) -> Image.Image:
    check_shape(frame.width, frame.height, max_pixels)
    return bounded(frame.to_image().rotate(frame.rotation, expand=True) if frame.rotation else frame.to_image())


def bounded(image: Image.Image) -> Image.Image:
    """Return an image, scaled down where it has more than `FRAME_PIXELS` pixels."""
    scale = math.sqrt(FRAME_PIXELS / (image.width * image.height))
    if scale >= 1:
        return image
    size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)
