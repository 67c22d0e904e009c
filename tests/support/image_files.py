"""Image files, and data sets of them."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from catp_lightning.data.vqa import VQASplit

QUESTION = "how many digits are there?"


def split_of(folder: Path, images: dict[str, bytes], questions: list[str] | None = None) -> VQASplit:
    """A split of one question an image; image files keep the bytes that are given, whatever their names say."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    asked = questions or [QUESTION] * len(images)
    for number, content in enumerate(images.values()):
        (folder / "images" / f"{number}.png").write_bytes(content)
    records = [
        {"question_id": 10 * number, "image_id": number % len(images), "question": text}
        for number, text in enumerate(asked)
    ]
    (folder / "questions.json").write_text(json.dumps({"questions": records}))
    return VQASplit(str(folder / "questions.json"), str(folder / "images"), image_name="{image_id}.png")


def encoded(image: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def noise(width: int, height: int) -> Image.Image:
    draw = np.random.default_rng(0)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
