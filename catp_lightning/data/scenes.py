"""Digit scenes: handwritten digits on a grid, with questions, in the official VQAv2 layout.

The 1,797 digits of `sklearn.datasets.load_digits` are real handwriting. They are split once, by digit image, into pools
for training, calibration and test: a model can be asked about digits that neither its training nor its calibration saw.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from catp_lightning.utils.files import write_bytes, write_json

Split = Literal["train", "calibration", "test"]

GRID = 4  # cells a side
CELL = 16  # pixels a cell side: a digit of 8 x 8 at twice its size
NATIVE = 8  # pixels a side of the digits as they were written
MOST_DIGITS = 3
EMPTY = -1
SPLIT_SEED = 2404  # the split is part of the data set: a model trained on one split must never be tested on another

TURN = "{question} Short answer: {answer} Question: "
"""An earlier turn, put before a question: the prompts of all shipped models (`PROMPTS`) then go on as they began."""

KINDS = ("how many", "is there", "largest or smallest", "which digit")


@dataclass(frozen=True)
class DigitPool:
    """N digits that scenes are drawn from: `images` float32 [N, 16, 16] in [0, 1], `labels` int64 [N]."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Drawing:
    """How scenes are drawn; the defaults are how the shipped models saw them in training.

    Attributes:
        noise: standard deviation of the background, whose brightness goes from 0 to 1.
        contrast: the least and the greatest brightness that a digit adds.
        shift: pixels by which each digit leaves its cell, up or down and left or right, within the picture; fewer than
            `CELL`, and above 0 only for grids of at least 2 x 2 cells.
        digits: the least and the greatest number of digits.
        glyph: pixels a side of each digit, `NATIVE` to `CELL`; a smaller one than `CELL` is somewhere in its cell.

    Raises:
        ValueError: `glyph` is not in `NATIVE` to `CELL`.
    """

    noise: float = 0.08
    contrast: tuple[float, float] = (0.7, 1.0)
    shift: int = 0
    digits: tuple[int, int] = (1, MOST_DIGITS)
    glyph: int = CELL

    def __post_init__(self) -> None:
        if not NATIVE <= self.glyph <= CELL:
            raise ValueError(f"glyph is {self.glyph}; a digit is {NATIVE} to {CELL} pixels a side.")


AS_TRAINED = Drawing()


@dataclass(frozen=True)
class Scene:
    """One picture of R x C cells: `image` uint8 [16 R, 16 C], `grid` int64 [R, C], each cell's digit or `EMPTY`."""

    image: np.ndarray
    grid: np.ndarray


@dataclass(frozen=True)
class Question:
    """A question about a scene; `kind` is one of `KINDS`, `answer_type` one of VQAv2's."""

    text: str
    answer: str
    kind: str
    answer_type: str


@cache
def digit_pool(split: Split) -> DigitPool:
    """Return a split's digits: 1,200 for training, 240 for calibration, 357 for test; no image is in two splits."""
    digits = load_digits()
    rest, train = train_test_split(
        np.arange(len(digits.target)), test_size=1200, random_state=SPLIT_SEED, stratify=digits.target
    )
    test, calibration = train_test_split(rest, test_size=240, random_state=SPLIT_SEED, stratify=digits.target[rest])
    chosen = {"train": train, "calibration": calibration, "test": test}[split]
    images = np.kron(digits.images[chosen] / 16, np.ones((1, 2, 2))).astype(np.float32)
    return DigitPool(images, digits.target[chosen])


def draw_scene(
    rng: np.random.Generator, pool: DigitPool, rows: int = GRID, columns: int = GRID, drawing: Drawing = AS_TRAINED
) -> Scene:
    """Draw digits in different cells of a grid, each at its own contrast, on a noisy background.

    Drawings that differ in noise, contrast, shift and glyph alone have the same digits in the same cells.
    """
    count = rng.integers(drawing.digits[0], drawing.digits[1] + 1)
    cells = rng.choice(rows * columns, count, replace=False)
    drawn = rng.choice(len(pool.labels), count, replace=False)
    canvas = np.abs(rng.normal(0, drawing.noise, (rows * CELL, columns * CELL)))
    grid = np.full((rows, columns), EMPTY)
    moves, places = np.zeros((2, count, 2), int)
    if drawing.shift:  # from a generator of their own: the other draws stay what they are
        moves = drawing.shift * rng.spawn(1)[0].choice([-1, 1], (count, 2))
    if drawing.glyph < CELL:
        places = rng.spawn(1)[0].integers(0, CELL - drawing.glyph + 1, (count, 2))
    for cell, digit, (down, right), (below, beside) in zip(cells, drawn, moves, places, strict=True):
        row, column = divmod(int(cell), columns)
        top, left = _moved(row, down, rows) + below, _moved(column, right, columns) + beside
        window = canvas[top : top + drawing.glyph, left : left + drawing.glyph]
        window += _resized(pool.images[digit], drawing.glyph) * rng.uniform(*drawing.contrast)
        grid[row, column] = pool.labels[digit]
    return Scene((canvas.clip(0, 1) * 255).astype(np.uint8), grid)


def _moved(cell: int, move: int, cells: int) -> int:
    """Return the first pixel of a cell that is moved by `move` pixels, or to the other side where it would leave."""
    start = cell * CELL + move
    return start if 0 <= start <= (cells - 1) * CELL else cell * CELL - move


def _resized(digit: np.ndarray, side: int) -> np.ndarray:
    """Return a digit float32 [16, 16] with another number of pixels a side."""
    if side == CELL:
        return digit
    native = Image.fromarray(digit[:: CELL // NATIVE, :: CELL // NATIVE])
    return np.asarray(native.resize((side, side), Image.Resampling.BILINEAR))


def ask_how_many(rng: np.random.Generator, grid: np.ndarray) -> Question:
    return Question("How many digits are there?", str((grid != EMPTY).sum()), "how many", "number")


def ask_is_there(rng: np.random.Generator, grid: np.ndarray) -> Question:
    present = grid[grid != EMPTY]
    digit = rng.choice(present) if rng.random() < 0.5 else rng.integers(10)
    return Question(f"Is there a {digit}?", "yes" if digit in present else "no", "is there", "yes/no")


def ask_extreme(rng: np.random.Generator, grid: np.ndarray) -> Question:
    present = grid[grid != EMPTY]
    word, answer = ("largest", present.max()) if rng.random() < 0.5 else ("smallest", present.min())
    return Question(f"What is the {word} digit?", str(answer), "largest or smallest", "number")


def ask_which(rng: np.random.Generator, grid: np.ndarray) -> Question:
    """Ask which digit a cell holds: four times in five a cell that holds one, otherwise any cell of the grid."""
    cells = np.argwhere(grid != EMPTY) if rng.random() < 0.8 else np.argwhere(np.ones_like(grid))
    row, column = rng.choice(cells)
    answer = "none" if grid[row, column] == EMPTY else str(grid[row, column])
    return Question(f"Which digit is in row {row + 1} column {column + 1}?", answer, "which digit", "other")


ASK: dict[str, Callable[[np.random.Generator, np.ndarray], Question]] = dict(
    zip(KINDS, (ask_how_many, ask_is_there, ask_extreme, ask_which), strict=True)
)


def _earlier(rng: np.random.Generator, grid: np.ndarray, kind: str, turns: int) -> str:
    """Return turns before a question of a kind, from a generator of their own, each of another kind than the next."""
    if not turns:
        return ""
    own, text = rng.spawn(1)[0], ""
    for _ in range(turns):
        kind = own.choice([other for other in KINDS if other != kind])
        question = ASK[kind](own, grid)
        text = TURN.format(question=question.text, answer=question.answer) + text
    return text


def write_scenes(
    folder: str | Path,
    split: Split,
    questions: int,
    seed: int = 0,
    questions_per_image: int = 2,
    grids: Sequence[tuple[int, int]] = ((GRID, GRID),),
    drawing: Drawing = AS_TRAINED,
    kinds: Sequence[str] = KINDS,
    turns: int = 1,
) -> Path:
    """Write scenes and their questions in VQAv2's layout, kinds of question in turn.

    Creates `questions.json`, `annotations.json` (ten equal answers each) and `images/{image_id:012d}.png` in `folder`,
    which is what `VQADataModule` reads. The same arguments give the same bytes.

    Args:
        folder: created if it does not exist.
        split: pool that the digits come from.
        questions: number of questions, at least 1.
        seed: seed of scenes and questions; image ids of different splits, or of seeds that differ modulo 1000, do not
            meet.
        questions_per_image: number of questions that share one image, at least 1; several do in VQAv2 itself.
        grids: rows and columns of cells; pictures take them in turn, and every kind of question is asked about each.
        drawing: noise, contrast, shift, number and size of digits.
        kinds: kinds of question, taken in turn; a kind that is named twice is asked twice as often.
        turns: number of questions in a prompt, at least 1. The last is the question that 1 gives; those before it are
            about the same scene, each of another kind than the next, with their answers (`TURN`).

    Returns:
        `folder`, as a path.

    Raises:
        ValueError: `questions`, `questions_per_image` or `turns` is below 1, or `kinds` is empty or names an unknown
            one.
    """
    if questions < 1 or questions_per_image < 1 or turns < 1:
        raise ValueError(
            f"questions, questions_per_image and turns must be at least 1, got {questions}, {questions_per_image} and "
            f"{turns}."
        )
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds is {list(kinds)}; give one or several of {', '.join(map(repr, KINDS))}.")
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    salt = ("train", "calibration", "test").index(split)
    rng, pool = np.random.default_rng([seed, salt]), digit_pool(split)
    asked, annotated = [], []
    for number in range(questions):
        image_id = (salt * 1000 + seed % 1000) * 1_000_000 + number // questions_per_image
        if number % questions_per_image == 0:
            rounds = number // max(len(kinds), questions_per_image)  # each goes through all kinds of question
            scene = draw_scene(rng, pool, *grids[rounds % len(grids)], drawing=drawing)
            buffer = BytesIO()
            Image.fromarray(scene.image).convert("RGB").save(buffer, format="png")
            write_bytes(folder / "images" / f"{image_id:012d}.png", buffer.getvalue(), durable=False)
        question = ASK[kinds[number % len(kinds)]](rng, scene.grid)
        ids = {"image_id": image_id, "question_id": image_id * 100 + number % questions_per_image}
        earlier = _earlier(rng, scene.grid, question.kind, turns - 1)
        asked.append({**ids, "question": earlier + question.text})
        answers = [{"answer": question.answer, "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)]
        annotated.append(
            {
                **ids,
                "question_type": question.kind,
                "answer_type": question.answer_type,
                "multiple_choice_answer": question.answer,
                "answers": answers,
            }
        )
    head = {"info": {"description": "digit scenes"}, "data_type": "digits", "data_subtype": split, "license": {}}
    write_json(folder / "questions.json", {**head, "task_type": "Open-Ended", "questions": asked})
    write_json(folder / "annotations.json", {**head, "annotations": annotated})
    return folder
