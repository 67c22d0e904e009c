"""Write small real videos, whose frames are told apart by their grey."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

STEP = 4


def write_video(
    path: Path,
    frames: int = 60,
    codec: str = "libx264",
    rate: int = 10,
    size: tuple[int, int] = (64, 48),
    pixels: str = "yuv420p",
    **options: Any,
) -> Path:
    """Frame i is grey of value 4 i; `options` are the encoder's, such as g, the frames between key frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.bit_rate = 4_000_000  # or greys are not exact enough
        stream.options = {"g": "12", **{name: str(value) for name, value in options.items()}}
        for number in range(frames):
            grey = np.full((size[1], size[0], 3), number * STEP, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def frames_of(images: Sequence[Image.Image]) -> list[int]:
    """The number of each frame, from its grey."""
    return [round(float(np.asarray(image).mean()) / STEP) for image in images]
