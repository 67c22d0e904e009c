"""Digit scenes: real digits, pools that share no image, right answers, the official layout."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from catp_lightning.data.scenes import ASK, CELL, EMPTY, GRID, KINDS, digit_pool, draw_scene, write_scenes

SPLITS = ("train", "calibration", "test")


def test_pools_are_all_digits_and_share_no_image() -> None:
    pools = {split: digit_pool(split) for split in SPLITS}
    assert [len(pools[split].labels) for split in SPLITS] == [1200, 240, 357]
    pictures = {split: {image.tobytes() for image in pools[split].images} for split in SPLITS}
    assert sum(map(len, pictures.values())) == len(set.union(*pictures.values())) == 1797, "disjoint by digit image"
    for pool in pools.values():
        counts = np.bincount(pool.labels, minlength=10)
        assert counts.min() > 0.08 * len(pool.labels), "every digit is in every pool"
    real = {(np.kron(i / 16, np.ones((2, 2))).astype(np.float32)).tobytes() for i in load_digits().images}
    assert set.union(*pictures.values()) == real


def test_a_scene_holds_its_digits_where_its_grid_says() -> None:
    rng, pool = np.random.default_rng(3), digit_pool("test")
    for _ in range(50):
        scene = draw_scene(rng, pool)
        assert scene.image.shape == (GRID * CELL, GRID * CELL) and scene.image.dtype == np.uint8
        assert 1 <= (scene.grid != EMPTY).sum() <= 3
        cells = scene.image.reshape(GRID, CELL, GRID, CELL).transpose(0, 2, 1, 3).reshape(GRID, GRID, -1)
        assert np.array_equal(cells.max(-1) > 150, scene.grid != EMPTY)


def test_pictures_take_grids_in_turn_and_every_kind_of_question_is_asked_about_each(tmp_path: Path) -> None:
    grids = ((3, 3), (3, 6), (6, 6))
    write_scenes(tmp_path, "test", 24, grids=grids)
    kinds: dict[tuple[int, int], set[str]] = {}
    for note in json.loads((tmp_path / "annotations.json").read_text())["annotations"]:
        with Image.open(tmp_path / "images" / f"{note['image_id']:012d}.png") as image:
            kinds.setdefault((image.height // CELL, image.width // CELL), set()).add(note["question_type"])
    assert kinds == {grid: set(KINDS) for grid in grids}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_follow_from_the_grid(kind: str) -> None:
    rng, grids = np.random.default_rng(5), []
    for _ in range(200):
        grid = draw_scene(rng, digit_pool("train")).grid
        grids.append(grid)
        question = ASK[kind](rng, grid)
        present = sorted(int(d) for d in grid.flatten() if d != EMPTY)
        numbers = [int(n) for n in re.findall(r"\d", question.text)]
        expected = {
            "how many": lambda: str(len(present)),  # noqa: B023
            "is there": lambda: "yes" if numbers[0] in present else "no",  # noqa: B023
            "largest or smallest": lambda: str(present[-1] if "largest" in question.text else present[0]),  # noqa: B023
            "which digit": lambda: {EMPTY: "none"}.get(v := int(grid[numbers[0] - 1, numbers[1] - 1]), str(v)),  # noqa: B023
        }[kind]()
        assert question.answer == expected and question.kind == kind


def test_the_files_are_vqav2s(tmp_path: Path) -> None:
    write_scenes(tmp_path, "test", 9, seed=1, questions_per_image=2)
    asked = json.loads((tmp_path / "questions.json").read_text())
    annotated = json.loads((tmp_path / "annotations.json").read_text())
    assert asked["task_type"] == "Open-Ended" and len(asked["questions"]) == len(annotated["annotations"]) == 9
    assert set(asked["questions"][0]) == {"image_id", "question_id", "question"}
    keys = {"image_id", "question_id", "question_type", "answer_type", "multiple_choice_answer", "answers"}
    assert set(annotated["annotations"][0]) == keys
    for question, annotation in zip(asked["questions"], annotated["annotations"], strict=True):
        assert question["question_id"] == annotation["question_id"] and question["image_id"] == annotation["image_id"]
        answers = annotation["answers"]
        assert [a["answer_id"] for a in answers] == list(range(1, 11))
        assert {a["answer"] for a in answers} == {annotation["multiple_choice_answer"]}
        with Image.open(tmp_path / "images" / f"{question['image_id']:012d}.png") as image:
            assert image.size == (64, 64) and image.mode == "RGB"
    assert len({q["question_id"] for q in asked["questions"]}) == 9
    assert len({q["image_id"] for q in asked["questions"]}) == 5
    assert {a["question_type"] for a in annotated["annotations"]} == set(KINDS)


def test_the_same_arguments_give_the_same_bytes_and_others_share_no_id(tmp_path: Path) -> None:
    folders = [write_scenes(tmp_path / str(n), "test", 6, seed=seed) for n, seed in enumerate((0, 0, 1))]
    folders.append(write_scenes(tmp_path / "calibration", "calibration", 6))
    contents = [{f.relative_to(x): f.read_bytes() for f in sorted(x.rglob("*.*"))} for x in folders]
    assert contents[0] == contents[1] and contents[0] != contents[2]
    ids = [{q["image_id"] for q in json.loads((x / "questions.json").read_text())["questions"]} for x in folders[1:]]
    assert not ids[0] & ids[1] and not ids[0] & ids[2]


def test_scenes_are_what_they_have_always_been(tmp_path: Path) -> None:
    place = write_scenes(tmp_path, "test", 24, seed=5, grids=((4, 4), (3, 6)))
    digest = hashlib.sha256((place / "questions.json").read_bytes() + (place / "annotations.json").read_bytes())
    for file in sorted((place / "images").iterdir()):
        with Image.open(file) as image:  # pixels: releases of zlib compress them to different bytes
            digest.update(np.asarray(image).tobytes())
    assert digest.hexdigest() == "fc8d30226ca57c5131826d8c31a333c671c859e694ed4829c042009603445570"


@pytest.mark.parametrize("kinds", [(), ("how many", "why")])
def test_unknown_kinds_of_question_are_refused(kinds: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give one or several of 'how many'"):
        write_scenes(tmp_path / "x", "test", 4, kinds=kinds)


def test_no_questions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1, got 0, 2 and 1"):
        write_scenes(tmp_path / "x", "test", 0)
    assert not (tmp_path / "x").exists()
