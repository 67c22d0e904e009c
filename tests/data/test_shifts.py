"""Test sets unlike the training: the same scenes with smaller digits, and the same questions after other ones."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from catp_lightning import PruningPolicy, TokenPruning, VQAModule
from catp_lightning.cli.main import main
from catp_lightning.data import GRIDS, PROMPTS, SHIPPED, shipped
from catp_lightning.data.scenes import CELL, EMPTY, KINDS, NATIVE, Drawing, digit_pool, draw_scene, write_scenes
from catp_lightning.data.shifts import SHIFTS, Shift
from catp_lightning.data.vqa import VQADataModule
from catp_lightning.data.vqa_dataset import VQASplit
from tests.support.processors import needs_processors_of_qwen
from tests.support.trainers import trainer

TWO_TURNS = re.compile(r"^(.+\?) Short answer: (\w+) Question: (.+\?)$")
STARTS = dict(zip(KINDS, ("How many", "Is there", "What is the", "Which digit"), strict=True))

every_model = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=needs_processors_of_qwen if name == "digits_qwen2_5_vl" else ()) for name in SHIPPED],
)


def read(folder: Path, name: str) -> list[dict[str, str]]:
    records: list[dict[str, str]] = json.loads((folder / f"{name}.json").read_text())[name]
    return records


@pytest.mark.parametrize("name", SHIFTS)
def test_a_set_is_the_same_bytes_again_and_another_than_the_plain_one(name: str, tmp_path: Path) -> None:
    sets = (SHIFTS[name], SHIFTS[name], Shift())
    folders = [shift.write(tmp_path / str(n), "test", 12, 3) for n, shift in enumerate(sets)]
    contents = [{f.relative_to(x): f.read_bytes() for f in sorted(x.rglob("*.*"))} for x in folders]
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.parametrize("name", ["detail", "noisy", "moved"])
def test_a_drawing_changes_neither_digits_nor_questions_nor_answers(name: str, tmp_path: Path) -> None:
    plain, drawn = (shift.write(tmp_path / str(n), "test", 40) for n, shift in enumerate((Shift(), SHIFTS[name])))
    assert read(plain, "questions") == read(drawn, "questions")
    assert read(plain, "annotations") == read(drawn, "annotations")


def test_small_digits_are_whole_in_the_cells_where_large_ones_were_and_not_always_at_one_place() -> None:
    places = set()
    for number in range(60):
        drawing = replace(SHIFTS["detail"].drawing, noise=0.0, contrast=(1.0, 1.0))
        large, small = (
            draw_scene(np.random.default_rng(number), digit_pool("test"), 3, 3, drawn)
            for drawn in (replace(drawing, glyph=CELL), drawing)
        )
        assert (large.grid == small.grid).all()
        cells = small.image.reshape(3, CELL, 3, CELL).swapaxes(1, 2)
        assert not cells[small.grid == EMPTY].any()
        for cell in cells[small.grid != EMPTY]:
            rows, columns = (np.flatnonzero(cell.any(axis)) for axis in (1, 0))
            assert rows.max() - rows.min() < 12 and columns.max() - columns.min() < 12
            places.add((int(rows.min()), int(columns.min())))
        ink = [float(scene.image.astype(int).sum()) for scene in (large, small)]
        assert ink[1] / ink[0] == pytest.approx((12 / CELL) ** 2, rel=0.1)
    assert len(places) > 10


def test_a_digit_of_the_native_size_has_the_pixels_it_was_written_with() -> None:
    drawing = Drawing(noise=0.0, contrast=(1.0, 1.0), digits=(1, 1), glyph=NATIVE)
    pool = digit_pool("test")
    written = {(image[::2, ::2] * 255).astype(np.uint8).tobytes() for image in pool.images}
    image = draw_scene(np.random.default_rng(0), pool, 2, 2, drawing).image
    windows = np.lib.stride_tricks.sliding_window_view(image, (NATIVE, NATIVE)).reshape(-1, NATIVE, NATIVE)
    assert any(window.tobytes() in written for window in windows)


@pytest.mark.parametrize("glyph", [NATIVE - 1, CELL + 1])
def test_digits_of_other_sizes_are_refused(glyph: int) -> None:
    with pytest.raises(ValueError, match=f"glyph is {glyph}; a digit is 8 to 16 pixels a side"):
        Drawing(glyph=glyph)


def test_the_scored_question_is_the_plain_one_and_an_answered_one_of_another_kind_is_before_it(tmp_path: Path) -> None:
    plain, turns = (
        shift.write(tmp_path / str(n), "test", 200) for n, shift in enumerate((Shift(), SHIFTS["several-turns"]))
    )
    assert read(plain, "annotations") == read(turns, "annotations")
    images = [[f.read_bytes() for f in sorted((x / "images").iterdir())] for x in (plain, turns)]
    assert images[0] == images[1]
    known: dict[tuple[str, str], str] = {}  # the plain set's answers: an earlier turn must not contradict them
    asked = list(zip(read(plain, "questions"), read(plain, "annotations"), strict=True))
    for question, note in asked:
        known[question["image_id"], question["question"]] = note["multiple_choice_answer"]
    contradicted, shared, kinds = 0, 0, set()
    for (question, note), long in zip(asked, read(turns, "questions"), strict=True):
        found = TWO_TURNS.match(long["question"])
        assert found is not None and found[3] == question["question"]
        before = next(kind for kind, start in STARTS.items() if found[1].startswith(start))
        assert before != note["question_type"]
        kinds.add(before)
        if (question["image_id"], found[1]) in known:
            shared += 1
            contradicted += known[question["image_id"], found[1]] != found[2]
    assert shared > 10 and contradicted == 0 and kinds == set(KINDS)


def test_three_turns_are_three_questions_and_none_is_refused(tmp_path: Path) -> None:
    place = write_scenes(tmp_path / "x", "test", 4, turns=3)
    assert all(record["question"].count("?") == 3 for record in read(place, "questions"))
    with pytest.raises(ValueError, match="turns must be at least 1, got 4, 2 and 0"):
        write_scenes(tmp_path / "y", "test", 4, turns=0)


def test_the_command_draws_the_test_split_alone_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "shifted"):
        more = ["--shift", "several-turns"] if name == "shifted" else []
        main(["scenes", "--output", name, "--questions", "4", "--calibration_questions", "4", *more])
    plain, shifted = Path("plain"), Path("shifted")
    assert read(plain / "calibration", "questions") == read(shifted / "calibration", "questions")
    assert all("Short answer:" in record["question"] for record in read(shifted / "test", "questions"))


def test_the_commands_help_names_every_set(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["scenes", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(name in said for name in SHIFTS)


@every_model
def test_a_prompt_of_two_turns_repeats_the_models_own_template(name: str, tmp_path: Path) -> None:
    split = VQASplit.of_scenes(SHIFTS["several-turns"].write(tmp_path, "test", 4, grids=GRIDS[name]))
    data = VQADataModule(str(shipped(name)), test=split, prompt=PROMPTS[name], batch_size=4)
    (batch,) = data.test_dataloader()
    tokenizer = VQAModule(str(shipped(name))).processor.tokenizer
    own = PROMPTS[name][PROMPTS[name].index("Question:") :]
    for record, ids in zip(read(tmp_path, "questions"), batch["inputs"]["input_ids"], strict=True):
        found = TWO_TURNS.match(record["question"])
        assert found is not None
        turns = f"{own.format(found[1])} {found[2]} {own.format(found[3])}"
        expected = tokenizer(turns, add_special_tokens=False)["input_ids"]
        assert ids.tolist()[-len(expected) :] == expected and tokenizer.unk_token_id not in expected


@pytest.mark.slow
@every_model
@pytest.mark.parametrize("shift", ["detail", "several-turns"])
def test_a_shipped_model_answers_unpruned_and_pruned(name: str, shift: str, tmp_path: Path) -> None:
    split = VQASplit.of_scenes(SHIFTS[shift].write(tmp_path, "test", 24, grids=GRIDS[name]))
    data = VQADataModule(str(shipped(name)), test=split, prompt=PROMPTS[name], batch_size=24)
    module, said = VQAModule(str(shipped(name))), []
    for policy in (None, PruningPolicy("divprune", keep=1.0), PruningPolicy("divprune", keep=0.05)):
        callbacks = [] if policy is None else [TokenPruning(policy)]
        (answers,) = trainer(*callbacks).predict(module, data.test_dataloader()) or []
        said.append([answer["answer"] for answer in answers])
    assert said[0] == said[1] != said[2]
