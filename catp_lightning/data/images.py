"""Read image files as RGB, upright and of bounded size: files of a foreign data set may be damaged or malicious."""

import math
import mmap
import os
import re
import struct
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are read, told by a file's content. Pillow knows fifty more; for some it starts other programs."""

MAX_PIXELS = 2**26
"""Default limit on the pixels of a decoded image: 8192 x 8192, a photo of 64 megapixels, 192 MiB as RGB."""

KEPT_PIXELS = 2**24
"""Limit on the pixels of a returned image, 48 MiB as RGB: no processor of transformers reads more than 4096 x 4096."""

MAX_RATIO = 1000
"""Limit on the ratio of an image's sides: processors that scale the short side up to a fixed length would make
gigabytes of a thinner image."""

MAX_BYTES = 2**27
"""Limit on the bytes of a file. Metadata, which is read before an image's size is known, may be all of it."""

MAX_SCANS = 100
"""Limit on the scans of a JPEG: a scan of a hundred bytes has to be decoded over the whole image. Progressive JPEGs
have about ten."""

MAX_PIECES = 2**16
"""Limit on the strips or tiles of a TIFF, and on the numbers in any of its tags: Pillow makes an object of each."""


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the image in a file: RGB, upright as its EXIF data says, at most `KEPT_PIXELS` pixels, without metadata.

    Of several frames the first is taken, transparency is ignored, and of 16 bits of grey the upper 8 are read. Images
    above `KEPT_PIXELS` are scaled down to it with their aspect ratio; smaller ones keep every pixel.

    Args:
        path: path of a regular file.
        max_pixels: limit on the pixels that are decoded; `PIL.Image.MAX_IMAGE_PIXELS` holds as well where it is lower.

    Raises:
        Exception: of any type, for damaged files make Pillow's decoders raise OSError, SyntaxError, zlib.error and
            more. A file that this function itself refuses is an OSError that says what is allowed.
    """
    if not path.is_file():  # opening a pipe would wait for ever
        raise OSError("it is not a file")
    with open(path, "rb") as file:
        return _decoded(file, os.fstat(file.fileno()).st_size, max_pixels)


def image_from(content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the image in the bytes of a file, with the same limits and errors as `read_image`."""
    return _decoded(BytesIO(content), len(content), max_pixels)


def _decoded(file: BinaryIO, size: int, max_pixels: int) -> Image.Image:
    if size > MAX_BYTES:
        raise OSError(f"it has {size:,} bytes, more than {MAX_BYTES:,}")
    _check_scans(file)
    _check_pieces(file)
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise OSError(f"its format is not one of {', '.join(FORMATS)}") from error
    with image:
        _check_size(image, max_pixels)
        return _rgb(image)


def check_shape(width: int, height: int, most: int) -> None:
    """Raise OSError if an image of that size has more than `most` pixels, or is too thin."""
    if width * height > most:
        raise OSError(
            f"it has {width * height:,} pixels, more than {most:,}, the lower of max_pixels and "
            "PIL.Image.MAX_IMAGE_PIXELS; scale it down, or raise them where the file can be trusted"
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise OSError(f"it is {width} x {height} pixels; one side may be {MAX_RATIO} times the other at most")


def _check_size(image: Image.Image, max_pixels: int) -> None:
    """Raise OSError if an image, which is not decoded yet, has too many pixels, too thin a shape or too large tiles."""
    most = min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels)  # Pillow itself refuses only twice as many
    check_shape(*image.size, most)
    tile = [getattr(image, "tag_v2", {}).get(tag, 1) for tag in (322, 323)]  # a TIFF's, each decoded whole
    if not all(isinstance(side, int) for side in tile) or math.prod(tile) > most:
        raise OSError(f"its tiles are of {' x '.join(map(str, tile))} pixels, more than {most:,}")


_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")  # restart markers and stuffed bytes belong to a scan's data


def _check_scans(file: BinaryIO) -> None:
    """Raise OSError if a JPEG has more than `MAX_SCANS` scans; other files pass."""
    head = file.read(3)
    file.seek(0)
    if head != b"\xff\xd8\xff":
        return
    if isinstance(file, BytesIO):
        _count_scans(file.getvalue())
    else:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _count_scans(content)


def _count_scans(content: bytes | mmap.mmap) -> None:
    place, scans = 2, 0
    while (found := _MARKER.search(content, place)) and (marker := found[0][-1]) != 0xD9:  # the image's end
        scans += marker == 0xDA
        if scans > MAX_SCANS:
            raise OSError(f"it is a JPEG of more than {MAX_SCANS} scans")
        place = found.end() + int.from_bytes(content[found.end() : found.end() + 2])


_TIFF = (b"II*\0", b"II\0*", b"MM\0*", b"MM*\0", b"II+\0", b"MM\0+")  # two are malformed, but Pillow reads them


def _check_pieces(file: BinaryIO) -> None:
    """Raise OSError if a tag in the first directory of a TIFF has more than `MAX_PIECES` numbers; other files pass."""
    head = file.read(4)
    file.seek(0)
    if head not in _TIFF:
        return
    order, big = "<" if head[:2] == b"II" else ">", b"+" in head
    header, many, entry = (("4xI", "H", "HHI4x"), ("8xQ", "Q", "HHQ8x"))[big]
    (place,) = _unpacked(file, order + header, 0)
    (count,) = _unpacked(file, order + many, place)
    for number in range(min(count, MAX_PIECES)):
        start = place + struct.calcsize(order + many) + number * struct.calcsize(order + entry)
        tag, kind, numbers = _unpacked(file, order + entry, start)
        plain = kind in (1, 2, 6, 7) and tag not in (273, 324)  # bytes and text stay as they are, offsets do not
        if numbers > MAX_PIECES and not plain:
            raise OSError(f"it is a TIFF whose tag {tag} has {numbers:,} numbers, more than {MAX_PIECES:,}")
    file.seek(0)


def _unpacked(file: BinaryIO, layout: str, place: int) -> tuple[int, ...]:
    file.seek(place)
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _rgb(image: Image.Image) -> Image.Image:
    image.load()  # damaged pixels are refused here: Pillow does not find them a second time
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose black and white are not known")
    rgb = (_eight_bits(image) if image.mode.startswith("I") else image).convert("RGB")
    pixels = rgb.width * rgb.height
    if pixels > KEPT_PIXELS:
        scale = math.sqrt(KEPT_PIXELS / pixels)
        rgb = rgb.resize((int(rgb.width * scale), int(rgb.height * scale)), Image.Resampling.BICUBIC)
    rgb.info = {key: value for key, value in image.info.items() if key in _TURNING}
    with suppress(Exception):  # with damaged EXIF data the image is not turned
        rgb = ImageOps.exif_transpose(rgb)
    rgb.info = {}  # or texts and colour profiles would be held as long as the image
    return rgb


_TURNING = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
"""Keys of `Image.info` in which Pillow looks for an image's orientation."""


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return 16-bit grey, which Pillow would clip at 255, as its upper 8 bits."""
    values = np.asarray(image).clip(0, 2**16 - 1)
    values >>= 8
    return Image.fromarray(values.astype(np.uint8))
