"""easy-VQA's images and questions, alone and nine in a picture.

A scene is nine images in three rows. Its questions are those of its images, with the place behind: "what color is the
shape? northwest". Images, questions and answers are easy-VQA's own, and scenes are kept in its layout: one reader reads
both.
"""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from catp_lightning.data.benchmarks import EasyVQA
from catp_lightning.data.images import read_image

SIDE = 3  # images a row of a scene, and rows
CELL = 24  # pixels a side of an image in a scene
PLACES = ("northwest", "north", "northeast", "west", "center", "east", "southwest", "south", "southeast")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
ANSWERS = ("yes", "no", *COLORS, *SHAPES)


@dataclass
class Picture:
    """An image of easy-VQA, 64 x 64 pixels; its questions, each with its answer, those for yes or no apart."""

    image: Image.Image
    open: list[tuple[str, str]] = field(default_factory=list)
    yes_no: list[tuple[str, str]] = field(default_factory=list)

    @cached_property
    def cell(self) -> Image.Image:
        """The image as it is in a scene."""
        return self.image.resize((CELL, CELL))

    def ask(self, rng: np.random.Generator) -> tuple[str, str]:
        """Draw a question and its answer; one in two is open, where there are both kinds."""
        kinds = [kind for kind in (self.open, self.yes_no) if kind]
        kind = kinds[rng.integers(len(kinds))]
        return kind[rng.integers(len(kind))]

    @cached_property
    def kind(self) -> int:
        """Number of its colour and shape, from 0 to 23, as its open questions and answers tell; -1: they do not."""
        told = {word for asked in self.open for word in " ".join(asked).replace("?", "").split()}
        both = [(color, shape) for color in COLORS for shape in SHAPES]
        return next((number for number, (color, shape) in enumerate(both) if {color, shape} <= told), -1)


def read_pictures(folder: str) -> list[Picture]:
    """Read a split of easy-VQA, in the order of its file."""
    reader, found = EasyVQA(folder), dict[str, Picture]()
    for record in reader.records():
        picture = found.get(record.image) or Picture(read_image(reader.image_path(record)))
        found[record.image] = picture
        (picture.yes_no if record.reference in ("yes", "no") else picture.open).append((record.text, record.reference))
    return list(found.values())


def draw_scene(rng: np.random.Generator, pictures: list[Picture]) -> tuple[Image.Image, list[Picture]]:
    """Draw nine pictures, and put them into one of 72 x 72 pixels."""
    chosen = [pictures[number] for number in rng.choice(len(pictures), SIDE * SIDE, replace=False)]
    scene = Image.new("RGB", (SIDE * CELL, SIDE * CELL))
    for number, picture in enumerate(chosen):
        place = (number % SIDE * CELL, number // SIDE * CELL)
        scene.paste(picture.cell, place)
    return scene, chosen


def ask_scene(rng: np.random.Generator, chosen: list[Picture]) -> tuple[str, str]:
    """Draw a question about one of a scene's pictures, and its answer."""
    place = rng.integers(len(chosen))
    question, answer = chosen[place].ask(rng)
    return f"{question} {PLACES[place]}", answer


def write_split(folder: Path, pictures: list[Picture], singles: int, scenes: int, seed: int) -> None:
    """Write a split in easy-VQA's layout: `singles` pictures of one image, then `scenes`, two questions about each."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng, asked = np.random.default_rng(seed), list[tuple[str, str, int]]()
    for number in range(singles + scenes):
        if number < singles:
            picture = pictures[number % len(pictures)]
            image, questions = picture.image, [picture.ask(rng) for _ in range(2)]
        else:
            image, chosen = draw_scene(rng, pictures)
            questions = [ask_scene(rng, chosen) for _ in range(2)]
        image.save(folder / "images" / f"{number}.png")
        asked += [(question, answer, number) for question, answer in questions]
    (folder / "questions.json").write_text(json.dumps(asked))


def write_noisy(folder: Path, split: Path, noise: float = 0.1, seed: int = 0) -> None:
    """Write the questions of a split, and its images with Gaussian noise; 1.0 is the whole range of brightness."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for file in sorted((split / "images").iterdir(), key=lambda file: int(file.stem)):
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB")) + 255 * rng.normal(0, noise, (image.height, image.width, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / file.name)
    (folder / "questions.json").write_bytes((split / "questions.json").read_bytes())
