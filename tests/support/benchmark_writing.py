"""Write images and annotation files of small data sets."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_images(folder: Path, names: Iterable[str], first: int = 0) -> str:
    """An image of its own for each name, those of the seeds from `first` on; the folder is returned."""
    for number, name in enumerate(names, first):
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place, "PNG")
    return str(folder)


def write_json(path: Path, content: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def write_lines(path: Path, records: Iterable[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)
