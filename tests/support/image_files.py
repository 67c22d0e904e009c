"""Image files, and data sets of them."""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from PIL import Image

from catp_lightning import PruningPolicy, TokenPruning
from catp_lightning.data.vqa import VQADataModule, VQASplit
from catp_lightning.modules.vqa import VQAModule

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


GREY16 = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    return encoded(noise(20, 40), exif=exif.tobytes())


def animated() -> bytes:
    frames = [Image.new("P", (9, 9), number) for number in (3, 200)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=10)


def see_through() -> bytes:
    image = noise(12, 12).quantize(8)
    return encoded(image, transparency=bytes(range(0, 256, 32)))


ODD: dict[str, Callable[[], bytes]] = {
    "one pixel": lambda: encoded(noise(1, 1)),
    "one column": lambda: encoded(noise(1, 64)),
    "one row": lambda: encoded(noise(64, 1)),
    "three rows": lambda: encoded(noise(64, 3)),
    "three columns": lambda: encoded(noise(3, 64)),
    "a thousand to one": lambda: encoded(noise(2000, 2)),
    "16 bits, PNG": lambda: encoded(Image.fromarray(GREY16)),
    "16 bits, TIFF": lambda: encoded(Image.fromarray(GREY16), "TIFF"),
    "32 bits, TIFF": lambda: encoded(Image.fromarray(GREY16.astype(np.int32)), "TIFF"),
    "CMYK, JPEG": lambda: encoded(noise(30, 20).convert("CMYK"), "JPEG"),
    "palette with transparency": see_through,
    "grey with transparency": lambda: encoded(Image.new("LA", (9, 9), (77, 10))),
    "colour with transparency": lambda: encoded(noise(9, 9).convert("RGBA")),
    "1 bit": lambda: encoded(noise(9, 9).convert("1")),
    "animated GIF": animated,
    "turned by EXIF": rotated,
    "JPEG of another name": lambda: encoded(noise(32, 32), "JPEG"),
    "BMP of another name": lambda: encoded(noise(32, 32), "BMP"),
}


def answers(
    module: VQAModule, loader: VQADataModule, keep: float | None = 0.5, scorer: str = "catp"
) -> list[dict[str, Any]]:
    callbacks = [] if keep is None else [TokenPruning(PruningPolicy(scorer=scorer, keep=keep))]
    trainer = L.Trainer(callbacks=callbacks, accelerator="cpu", logger=False, enable_progress_bar=False)
    return [answer for batch in trainer.predict(module, loader) or [] for answer in batch]
