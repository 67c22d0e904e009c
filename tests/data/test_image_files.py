"""Image files of others: the named formats are read, bounded in pixels and place; what would do harm is refused."""

import json
import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, PngImagePlugin

from catp_lightning.data import images
from catp_lightning.data.images import FORMATS, KEPT_PIXELS, read_image
from catp_lightning.data.vqa import VQADataset, VQASplit
from catp_lightning.errors import DataError
from tests.support.image_files import encoded, noise, split_of


def read(folder: Path, content: bytes) -> Image.Image:
    return VQADataset(split_of(folder, {"x": content}))[0]["image"]


def test_an_image_that_is_a_postscript_program_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # where Pillow remembers the program it found
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(
        DataError, match=r"0\.png.* cannot be read: its format is not one of PNG, JPEG, WEBP, GIF, BMP, TIFF"
    ):
        read(tmp_path, content)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_named_format_is_read_by_its_content(tmp_path: Path, kind: str) -> None:
    assert read(tmp_path, encoded(noise(9, 7), kind)).size == (9, 7)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA", "JPEG2000", "PCX", "ICNS", "DDS", "PDF", "SGI", "AVIF"])
def test_another_format_is_refused_whatever_its_name(tmp_path: Path, kind: str) -> None:
    try:
        content = encoded(noise(64, 64), kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {kind}")
    with pytest.raises(DataError, match="its format is not one of PNG"):
        read(tmp_path, content)


def test_an_image_that_unpacks_to_hundreds_of_megabytes_is_refused_until_it_is_allowed(tmp_path: Path) -> None:
    content = encoded(Image.new("1", (9400, 9400)))
    with pytest.raises(DataError, match=r"it has 88,360,000 pixels, more than 67,108,864"):
        read(tmp_path, content)
    split = split_of(tmp_path, {"x": encoded(Image.new("1", (40, 30)))})
    split.max_pixels = 1199
    with pytest.raises(DataError, match=r"it has 1,200 pixels, more than 1,199, .* scale it down"):
        VQADataset(split)[0]
    split.max_pixels = 1200
    assert VQADataset(split)[0]["image"].size == (40, 30)
    with pytest.raises(DataError, match="max_pixels is 0"):
        VQASplit("q.json", "images", max_pixels=0)


def test_only_an_image_larger_than_any_processor_reads_is_scaled_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert KEPT_PIXELS == 4096**2
    monkeypatch.setattr(images, "KEPT_PIXELS", 1024**2)
    large = Image.linear_gradient("L").resize((1500, 1000))
    found = read(tmp_path, encoded(large, exif=turned()))
    assert found.width * found.height <= 1024**2 < 1.002 * found.width * found.height
    assert found.height / found.width == pytest.approx(1500 / 1000, rel=2e-3), "turned as its EXIF says"
    expected = np.asarray(large.resize((300, 200)).transpose(Image.Transpose.ROTATE_270), dtype=float)
    assert np.abs(np.asarray(found.resize((200, 300)).convert("L")) - expected).max() < 3
    usual = Image.linear_gradient("L").resize((1024, 1024))
    assert np.array_equal(np.asarray(read(tmp_path, encoded(usual)))[..., 1], np.asarray(usual))


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


def tiff(width: int, height: int, tags: list[tuple[int, int, int, int]], data: bytes, big: bool = False) -> bytes:
    """A grey TIFF of one strip or tile, whose directory has these tags (number, type, count, value) as well."""
    plain = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    start = 16 if big else 8
    data += b"\0" * (len(data) % 2)
    layout = ("<Q", "<HHQQ", "<Q") if big else ("<H", "<HHII", "<I")
    every = sorted([*plain, *tags])
    rows = b"".join(struct.pack(layout[1], *tag) for tag in every)
    head = b"II+\0\x08\0\0\0" if big else b"II*\0"
    head += struct.pack(layout[2], start + len(data))
    return head + data + struct.pack(layout[0], len(every)) + rows + bytes(len(struct.pack(layout[2], 0)))


def tiled(side: int, big: bool = False) -> bytes:
    data = zlib.compress(b"\5" * 256)
    place = 16 if big else 8
    tags = [(322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, place), (325, 4, 1, len(data))]
    return tiff(16, 16, tags, data, big)


def stripped(count: int, big: bool = False, kind: int = 4) -> bytes:
    return tiff(1, 16, [(273, kind, count, 8), (278, 4, 1, 1), (279, 4, count, 8)], bytes(4 * count), big)


def scanned(scans: int) -> bytes:
    content = encoded(Image.new("L", (64, 64)), "JPEG", progressive=True)
    *before, last = content.split(b"\xff\xda")
    return b"\xff\xda".join([*before, *[last[:-2]] * scans]) + b"\xff\xd9"


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_with(*chunks: bytes) -> bytes:
    content = encoded(noise(8, 8))
    return content[:33] + b"".join(chunks) + content[33:]


BOMB = zlib.compress(bytes(2**26), 9)
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a tile of a gigabyte": (lambda: tiled(32768), "its tiles are of 32768 x 32768 pixels"),
    "the same in BigTIFF": (lambda: tiled(32768, big=True), "its tiles are of 32768 x 32768 pixels"),
    "a million strips": (lambda: stripped(2**20), "tag 273 has 1,048,576 numbers, more than 65,536"),
    "the same of BigTIFF": (lambda: stripped(2**20, big=True), "tag 273 has 1,048,576 numbers"),
    "the same, told in bytes": (lambda: stripped(2**20, kind=1), "tag 273 has 1,048,576 numbers"),
    "a thousand scans": (lambda: scanned(1000), "a JPEG of more than 100 scans"),
    "a thread": (lambda: encoded(Image.new("L", (2, 2002))), "2 x 2002 pixels; one side may be 1000 times the other"),
    "a colour profile": (lambda: png_with(chunk(b"iCCP", b"x\0\0" + BOMB)), "too large"),
    "a text": (lambda: png_with(chunk(b"zTXt", b"x\0\0" + BOMB)), "too large"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_costs_much_is_refused_at_once(tmp_path: Path, name: str) -> None:
    make, message = BOMBS[name]
    dataset = VQADataset(split_of(tmp_path, {"x": make()}))
    start = time.process_time()
    with pytest.raises(DataError, match=message):
        dataset[0]
    assert time.process_time() - start < 2


def test_what_resembles_a_bomb_is_read(tmp_path: Path) -> None:
    for big in (False, True):
        assert read(tmp_path, tiled(16, big)).getpixel((3, 3)) == (5, 5, 5)
    assert read(tmp_path, scanned(20)).size == (64, 64)
    comments = b"\xff\xfe\0\x04\xff\xda" * 200  # a scan's marker, as text
    jpeg = encoded(noise(8, 8), "JPEG")
    assert read(tmp_path, jpeg[:2] + comments + jpeg[2:] + b"\xff\xda" * 200).size == (8, 8)  # and after the image


def test_metadata_is_not_kept_with_an_image(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 100_000)
    assert not read(tmp_path, encoded(noise(8, 8), pnginfo=info, exif=turned())).info


def test_a_file_of_too_many_bytes_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "hole.png", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="1,099,511,627,776 bytes, more than 134,217,728"):
        read_image(tmp_path / "hole.png")
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    with pytest.raises(DataError, match="bytes, more than 10"):
        read(tmp_path, encoded(noise(8, 8)))


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """An image beside the data set, which has one question about image 7 and no image."""
    (tmp_path / "data" / "images" / "7").mkdir(parents=True)
    (tmp_path / "secret-7.png").write_bytes(encoded(noise(8, 8)))
    records = [{"question_id": 1, "image_id": 7, "question": "?"}]
    (tmp_path / "data" / "questions.json").write_text(json.dumps({"questions": records}))
    return tmp_path / "secret-7.png"


def split_at(secret: Path, image_name: str, allow_outside: bool = False) -> VQASplit:
    data = secret.parent / "data"
    return VQASplit(str(data / "questions.json"), str(data / "images"), None, image_name, allow_outside)


@pytest.mark.parametrize(
    "way", ["../../secret-{image_id}.png", "{image_id}/../../../secret-{image_id}.png", "absolute"]
)
def test_an_image_name_that_leaves_the_folder_is_refused_unless_asked_for(secret: Path, way: str) -> None:
    way = str(secret.parent / "secret-{image_id}.png") if way == "absolute" else way
    with pytest.raises(DataError, match=r"1 of 1 image files of .* lie outside images=.* allow_outside=True"):
        VQADataset(split_at(secret, way))
    assert VQADataset(split_at(secret, way, allow_outside=True))[0]["image"].size == (8, 8)


@pytest.mark.parametrize("link", ["file", "folder", "chain"])
def test_a_link_that_leaves_the_folder_is_refused_unless_asked_for(secret: Path, link: str) -> None:
    folder, name = secret.parent / "data" / "images", "{image_id}.png"
    if link == "folder":
        (folder / "sub").symlink_to(secret.parent)
        name = "sub/secret-{image_id}.png"
    elif link == "file":
        (folder / "7.png").symlink_to(secret)
    else:
        (folder / "8.png").symlink_to("../../secret-7.png")
        (folder / "7.png").symlink_to("8.png")
    with pytest.raises(DataError, match="lie outside images="):
        VQADataset(split_at(secret, name))
    assert VQADataset(split_at(secret, name, allow_outside=True))[0]["image"].size == (8, 8)


def test_links_that_stay_inside_are_followed_and_the_folder_may_be_one(secret: Path) -> None:
    folder = secret.parent / "data" / "images"
    secret.rename(folder / "7" / "real.png")
    (folder / "7.png").symlink_to("7/real.png")
    (secret.parent / "elsewhere").symlink_to(folder)
    split = split_at(secret, "{image_id}.png")
    split.images = str(secret.parent / "elsewhere")
    assert VQADataset(split)[0]["image"].size == (8, 8)


def test_a_link_that_is_put_in_place_later_is_refused_when_it_is_read(secret: Path) -> None:
    place = secret.parent / "data" / "images" / "7.png"
    place.write_bytes(secret.read_bytes())
    dataset = VQADataset(split_at(secret, "{image_id}.png"))
    assert dataset[0]["image"].size == (8, 8)
    place.unlink()
    place.symlink_to(secret)
    with pytest.raises(DataError, match="it lies outside the folder of images"):
        dataset[0]
