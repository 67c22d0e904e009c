"""Frames of real video files: which ones, and what is refused."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from catp_lightning.data import videos
from catp_lightning.data.videos import bounded, numbers_in, read_video, sampled
from tests.support.video_files import frames_of, write_video

KINDS: dict[str, dict[str, Any]] = {
    "h264.mp4": {},
    "h264.mkv": {},
    "without times.avi": {},  # B-frames in AVI have no times
    "open.mp4": {"g": 12, "x264-params": "open-gop=1:bframes=3"},
    "one key frame.mp4": {"g": 1000},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "vp8.webm": {"codec": "libvpx"},
    "mpeg4.avi": {"codec": "mpeg4"},
    "moving.gif": {"codec": "gif", "pixels": "gray"},
}
every_kind = pytest.mark.parametrize("name", KINDS)


def official(count: int, fps: float, frames: int, bound: tuple[float, float] | None, first_idx: int) -> list[int]:
    """`get_index` of MVBench's authors, step by step."""
    start, end = bound if bound else (-100000, 100000)
    start_idx = max(first_idx, round(start * fps))
    max_frame = frames if first_idx == 1 else frames - 1
    end_idx = min(round(end * fps), max_frame)
    seg_size = float(end_idx - start_idx) / count
    return [int(start_idx + (seg_size / 2) + np.round(seg_size * idx)) for idx in range(count)]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("bound", [None, (0, 2.0), (1.25, 3.1), (0.34, 0.34), (2.5, 99.0)])
def test_frames_are_those_that_the_authors_of_mvbench_take(bound: tuple[float, float] | None, first: int) -> None:
    for frames in (1, 2, 7, 60, 1001):
        for count in (1, 3, 8, 16):
            if bound and bound[0] * 3 >= frames - 1:
                continue  # the part is not in the video
            numbers, _, _ = numbers_in(count, frames, 3.0, bound, start=first)
            assert [number + first for number in numbers] == official(count, 3.0, frames, bound, first)


@every_kind
def test_every_kind_of_file_gives_the_frames_that_were_written(name: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / name, **KINDS[name])
    for count, part in ((8, None), (60, None), (3, (2.0, 3.9)), (5, (5.5, 80.0))):
        clip = read_video(path, count, part)
        numbers, first, last = numbers_in(count, 60, 10.0, part)
        assert frames_of(clip.frames) == numbers, (count, part)
        assert clip.numbers == [number - first for number in numbers]
        assert (clip.total, clip.rate) == (last - first + 1, 10.0)
    assert clip.frames[0].size == (64, 48) and clip.frames[0].mode == "RGB"


def test_a_short_video_repeats_its_frames(tmp_path: Path) -> None:
    clip = read_video(write_video(tmp_path / "short.mp4", frames=2), 5)
    assert clip.numbers == sampled(5, 0, 1) and frames_of(clip.frames) == clip.numbers


def test_only_what_lies_between_key_frames_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    often = write_video(tmp_path / "often.mp4", frames=60, g=5)
    seldom = write_video(tmp_path / "seldom.mp4", frames=60, g=1000)
    monkeypatch.setattr(videos, "MAX_DECODED", 64 * 48 * 14)
    assert frames_of(read_video(often, 2).frames) == [14, 44]  # five frames or fewer for each, and a few of delay
    with pytest.raises(OSError, match=r"more than 43,008 pixels would have to be decoded"):
        read_video(seldom, 2)


def test_frames_are_upright(tmp_path: Path) -> None:
    path = write_video(tmp_path / "turned.mp4", frames=3)
    content = path.read_bytes()
    plain = b"".join(int(value * 65536).to_bytes(4, "big") for value in (1, 0, 0, 0, 1, 0, 0, 0, 16384))
    turned = b"".join((value % 2**32).to_bytes(4, "big") for value in (0, 65536, 0, -65536, 0, 0, 0, 0, 2**30))
    place = content.index(plain, content.index(b"tkhd"))  # the matrix of the track: held upright, a phone writes this
    path.write_bytes(content[:place] + turned + content[place + len(turned) :])
    assert read_video(path, 1).frames[0].size == (48, 64)


def test_large_frames_are_scaled_down(tmp_path: Path) -> None:
    path = write_video(tmp_path / "large.mp4", frames=1, size=(2560, 1440))
    (frame,) = read_video(path, 1).frames
    assert frame.size == (1930, 1086)
    assert frame.width * frame.height <= videos.FRAME_PIXELS
    assert bounded(Image.new("RGB", (1920, 1080))).size == (1920, 1080)


@every_kind
def test_half_a_file_is_refused(name: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / name, **KINDS[name])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    if path.suffix == ".gif":  # a GIF has no length: half of it is a shorter one
        assert read_video(path, 8).total < 60
        return
    with pytest.raises((OSError, ValueError), match=r"Invalid data|it ends after .* of [36]\.0 seconds"):
        read_video(path, 8)


def test_parts_and_kinds_that_are_not_there_are_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mp4")
    with pytest.raises(OSError, match=r"60 frames, 6\.0 seconds; there is none between \(6\.5, 9\.0\) seconds"):
        read_video(path, 2, (6.5, 9.0))
    with pytest.raises(OSError, match="neither a file nor a folder of frames"):
        read_video(tmp_path, 2)
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(OSError, match="neither a file nor a folder of frames"):
        read_video(tmp_path / "pipe.mp4", 2)
    for content in (b"", b"\0" * 4000, b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0" + bytes(60)):
        (tmp_path / "other.mp4").write_bytes(content)
        with pytest.raises((OSError, ValueError), match=r"Invalid (data|argument)"):
            read_video(tmp_path / "other.mp4", 2)


@pytest.mark.parametrize(
    "content",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:6\n#EXTINF:6,\n{}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {}\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    ],
)
def test_lists_of_other_files_and_addresses_are_not_followed(content: str, tmp_path: Path) -> None:
    secret = write_video(tmp_path / "elsewhere" / "secret.mp4")
    path = tmp_path / "list.mp4"
    path.write_text(content.format(secret))
    with pytest.raises(ValueError, match=r"Invalid argument|Invalid data"):
        read_video(path, 2)


def test_frames_of_too_many_pixels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "video.mp4")
    assert len(read_video(path, 2, max_pixels=64 * 48).frames) == 2
    with pytest.raises((OSError, ValueError)):
        read_video(path, 2, max_pixels=64 * 48 - 1)
    with monkeypatch.context() as unchecked:
        unchecked.setattr(videos, "check_shape", lambda *_: None)
        with pytest.raises(ValueError, match="Invalid argument"):  # by the decoder itself, before there is a frame
            read_video(path, 2, max_pixels=64 * 48 - 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 - 1)
    with pytest.raises((OSError, ValueError)):
        read_video(path, 2)
    thin = write_video(tmp_path / "thin.avi", frames=2, codec="mpeg4", size=(4002, 4))
    monkeypatch.undo()
    with pytest.raises(OSError, match=r"it is 4002 x 4 pixels; one side may be 1000 times the other at most"):
        read_video(thin, 1)


def test_a_file_of_too_many_packets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "video.mp4")
    monkeypatch.setattr(videos, "MAX_PACKETS", 59)
    with pytest.raises(OSError, match="it has more than 59 packets"):
        read_video(path, 2)
