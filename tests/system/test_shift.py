"""The shifts of the benchmark do what they say, its replays are predictions, and its verdicts are right, by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.answers import predict
from benchmarks.shift import SETTINGS, scenes
from benchmarks.shift_replay import PROMISED, RANDOM, Replayed, replayed
from benchmarks.shift_sets import sets_page
from benchmarks.shift_tables import BUDGETS, Measured, page, verdicts
from catp_lightning import PruningPolicy, VQAModule
from catp_lightning.data import PROMPTS, shipped
from catp_lightning.data.scenes import CELL, EMPTY, Scene, digit_pool, draw_scene
from catp_lightning.data.shifts import Shift
from catp_lightning.data.vqa import VQADataModule
from catp_lightning.evaluation.sweep.methods import CALIBRATED
from catp_lightning.utils.messages import quiet


def drawn(name: str, **changes: float) -> list[Scene]:
    drawing = replace(SETTINGS[name].drawing, **changes)  # type: ignore[arg-type]
    return [draw_scene(np.random.default_rng(n), digit_pool("test"), 6, 6, drawing) for n in range(100)]


def cells(scene: Scene) -> dict[bool, np.ndarray]:
    """Return the pixels of cells that hold a digit (True) and of empty ones (False): float [cells, 16, 16]."""
    split = scene.image.reshape(6, CELL, 6, CELL).swapaxes(1, 2) / 255
    return {held: split[(scene.grid != EMPTY) == held] for held in (True, False)}


def test_noisy_scenes_have_twice_the_noise_and_half_the_contrast_of_the_same_digits() -> None:
    plain, noisy = drawn("as calibrated"), drawn("noisy")
    assert all((one.grid == other.grid).all() for one, other in zip(plain, noisy, strict=True))
    empty = [np.concatenate([cells(scene)[False] for scene in some]).mean() for some in (plain, noisy)]
    assert empty[1] / empty[0] == pytest.approx(2, rel=0.05)
    held = [np.concatenate([cells(scene)[True] for scene in some]).mean() for some in (plain, noisy)]
    assert (held[1] - empty[1]) / (held[0] - empty[0]) == pytest.approx(0.5, abs=0.1)  # bright pixels are clipped


def test_moved_digits_are_three_pixels_up_or_down_and_left_or_right_of_where_they_were() -> None:
    seen = set()
    for plain, moved in zip(drawn("as calibrated", noise=0.0), drawn("moved", noise=0.0), strict=True):
        assert (plain.grid == moved.grid).all()
        if (plain.grid != EMPTY).sum() == 1:
            moves = [(down, right) for down in (-3, 3) for right in (-3, 3)]
            (found,) = [move for move in moves if (np.roll(plain.image, move, (0, 1)) == moved.image).all()]
            seen.add(found)
    assert len(seen) == 4


def test_crowded_scenes_have_four_or_five_digits() -> None:
    assert {int((scene.grid != EMPTY).sum()) for scene in drawn("crowded")} == {4, 5}


def test_the_other_mix_counts_in_seven_of_ten_questions_and_never_asks_an_image_twice(tmp_path: Path) -> None:
    split = scenes(tmp_path, "digits_blip2", "test", 20, 0, SETTINGS["other-questions"])
    data = VQADataModule(str(shipped("digits_blip2")), test=split, prompt=PROMPTS["digits_blip2"], batch_size=20)
    (batch,) = data.test_dataloader()
    assert batch["question_types"].count("how many") == 14 and len(set(batch["question_types"])) == 4
    assert len(batch["image_ids"].unique()) == 20


@pytest.mark.slow
@pytest.mark.parametrize("model", ["digits_llava", "digits_mllama"])
def test_replayed_answers_are_predicted_answers_wherever_tokens_leave(model: str, tmp_path: Path) -> None:
    split = scenes(tmp_path, model, "test", 16, 0, Shift())  # mllama: images of one to four tiles
    data = VQADataModule(str(shipped(model)), test=split, prompt=PROMPTS[model], batch_size=16)
    rules = ["grid", "l2-norm"] + (["visionzip", "fastv"] if model == "digits_llava" else ["trimmed-llama"])
    jobs = [(rule, PruningPolicy(rule, keep=keep)) for keep in (0.125, 0.05) for rule in rules]
    module, batches = VQAModule(str(shipped(model))), list(data.test_dataloader())
    with quiet():
        found = replayed(module, batches, jobs)
        full = predict(module, batches, None)
        for (_, policy), same in zip(jobs, found.same, strict=True):
            assert np.equal(predict(module, batches, policy), full).tolist() == same.tolist()
    assert not found.same.all() and found.same.any()
    assert found.kinds == batches[0]["question_types"] and found.answers == full
    assert found.right.tolist() == [said == of[0] for said, of in zip(full, batches[0]["answers"], strict=True)]
    assert found.tokens[:2] == pytest.approx([found.tokens[1]] * 2) == found.read[:2]
    if model == "digits_llava":  # of 144 tokens two layers of four read all, two an eighth
        assert (found.tokens[3], found.read[3]) == (18, (2 * 144 + 2 * 18) / 4)


def of_model(model: str, right: dict[str, int], dear: str = "") -> Measured:
    """Return what was measured where each method answers its number of 40 questions as the unpruned model does.

    Under the rule `dear` a layer reads twice as many tokens; the unpruned model is right on the first 20 questions.
    """
    jobs = [(name, keep) for name in right for keep in BUDGETS[model]]
    same = np.array([np.arange(40) < right[name] for name, _ in jobs])
    names, keeps = [name for name, _ in jobs], [keep for _, keep in jobs]
    read = [16.0 if name == dear else 8.0 for name, _ in jobs]
    asked = (["how many"] * 20 + ["is there"] * 20, ["1"] * 15 + ["2"] * 5 + ["yes"] * 10 + ["no"] * 10)
    of_all = Replayed(names, keeps, same, [8.0] * len(jobs), list(range(40)), *asked, np.arange(40) < 20, read)
    return Measured(model, [["some rule"] * 4], {"as calibrated": of_all, "noisy": of_all})


def test_the_verdicts_compare_with_aims_and_rivals() -> None:
    ahead = verdicts(of_model("digits_llava", {"divprune": 30, "grid": 20, CALIBRATED: 40}))
    assert len(ahead) == 2 + 8 + 4 + 2 and {line[-1] for line in ahead} == {"yes"}
    behind = verdicts(of_model("digits_llava", {"divprune": 40, "grid": 30, CALIBRATED: 30}))
    assert {line[-1] for line in behind if "divprune" in line[0]} == {"**no**"}
    level = [line for line in behind if "grid" in line[0]]
    assert [line[-1] for line in level] == ["yes"] * 4 + ["**no**"] * 2
    assert behind[0] == ["1/8: at least 0.975", behind[0][1], "**no**"] and behind[0][1].startswith("0.750 (")


def test_the_page_shows_kinds_shifts_and_choices() -> None:
    text = page([of_model("digits_blip2", {"divprune": 20, "stride": 10, CALIBRATED: 30})], "About.")
    assert "| how many | 1.000 | 1.000 | 1.000 | 1.000 |" in text and "| is there | 0.500 |" in text
    assert "| noisy | 1/16 | 0.750 (" in text and "| stride 0.250 |" in text
    assert "| 0 | some rule | some rule |" in text


def test_a_table_has_a_column_for_each_set_and_rules_that_cost_more_stand_last_and_are_not_compared() -> None:
    right = {"divprune": 20, RANDOM: 10, "stride": 36, "fastv": 38, CALIBRATED: 30}
    text = sets_page([of_model("digits_blip2", right, dear="fastv")], "About.")
    table = text[text.index("at 1/16") :].splitlines()[4:9]
    order = ["| stride", "| **calibrated**", "| divprune", f"| {RANDOM}", "| fastv"]
    assert [line.split(" | ")[0] for line in table] == order
    assert table[4].endswith("| 16.0 |") and table[0].count("0.900 (") == 2
    assert "| unpruned model, accuracy | 0.500 | 0.500 |" in text
    assert "| agreement of an answer that sees nothing | 0.625 | 0.625 |" in text  # 15 of 20 counts, 10 of 20 others
    best = [line for line in text.splitlines() if line.startswith("| noisy | 1/16 |")]
    assert "| stride 0.900 | -0.150 (" in best[0] and best[0].endswith(" behind |")
    assert best[1].startswith("| noisy | 1/16 | stride | -0.150 (") and len(best) == 2
    assert f"| 1/16 | {CALIBRATED} | 1.000 | 1.000 |" in text  # right are the first 20, which are among the 30
    assert f"| 1/16 | {RANDOM} | 0.500 | 0.500 |" in text


def test_a_promise_stands_beside_the_disagreement_that_was_seen_on_each_set() -> None:
    measured = of_model("digits_blip2", {"divprune": 20, RANDOM: 10, CALIBRATED: 30, PROMISED: 38})
    steps = [{"keep": 0.5, "disagreed": 2, "bound": 0.031}, {"keep": 0.25, "disagreed": 4, "bound": 0.041}]
    promise = {"max_disagreement": 0.05, "images": 300, "steps": steps}
    text = sets_page([replace(measured, promise=(0.25, promise))], "About.")
    line = next(line for line in text.splitlines() if line.startswith("| BLIP-2 | 5% |"))
    assert line.startswith("| BLIP-2 | 5% | 0.25 | 4 of 300, at most 0.041 | 0.050 (0.000 to 0.125) |")
    assert PROMISED not in measured.plain.rivals and "| promised | 0." not in text
    assert "What a promise became" not in sets_page([measured], "About.")
    assert "There is none." in text  # calibrated is behind no other rule
