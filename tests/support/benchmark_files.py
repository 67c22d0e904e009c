"""Small data sets in the layouts of the official files, and their readers."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from catp_lightning.data.benchmarks import GQA, POPE, Reader


def write_images(folder: Path, names: Iterable[str]) -> str:
    """An image of its own for each name; the folder is returned."""
    for number, name in enumerate(names):
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


def pope(folder: Path, **change: Any) -> POPE:
    """Six questions about three images; `change` replaces fields of the second."""
    objects = [("snowboard", "yes"), ("dog", "no"), ("car", "yes"), ("cup", "no"), ("person", "yes"), ("bus", "no")]
    records: list[dict[str, Any]] = [
        {
            "question_id": number + 1,
            "image": f"COCO_val2014_{number // 2:012d}.jpg",
            "text": f"Is there a {name} in the image?",
            "label": label,
        }
        for number, (name, label) in enumerate(objects)
    ]
    images = write_images(folder / "val2014", dict.fromkeys(record["image"] for record in records))
    records[1].update(change)
    return POPE(write_lines(folder / "coco_pope_random.json", records), images)


def gqa(folder: Path, **change: Any) -> GQA:
    """Four questions about two images, of which the last is not balanced; `change` replaces fields of the second."""
    answers = [("Is it cloudy?", "yes"), ("Which color is the bus?", "red"), ("Is it old?", "no"), ("Who runs?", "man")]
    content: dict[str, dict[str, Any]] = {
        f"0{20131 + number}": {
            "semantic": [],
            "entailed": [],
            "equivalent": [],
            "question": question,
            "imageId": f"n{number // 2}",
            "isBalanced": number < 3,
            "groups": {"global": None, "local": ""},
            "answer": answer,
            "semanticStr": "",
            "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
            "types": {"detailed": "", "semantic": "global", "structural": "verify"},
            "fullAnswer": f"It is {answer}.",
        }
        for number, (question, answer) in enumerate(answers)
    }
    images = write_images(folder / "images", ["n0.jpg", "n1.jpg"])
    content["020132"].update(change)
    return GQA(write_json(folder / "testdev_balanced_questions.json", content), images)


DATA_SETS: Mapping[str, Callable[..., Reader]] = {"pope": pope, "gqa": gqa}
"""A function that writes each data set and returns its reader, by the name of its metric."""
