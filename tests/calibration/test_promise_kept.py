"""Over many calibrations a promise is broken no more often than it says, whatever kinds of question are asked."""

from pathlib import Path

import lightning as L
import numpy as np
import pytest
from rich.console import Console

from benchmarks.answers import QUIET, predict
from benchmarks.promise import CHECKED, KINDS, Answered, answered_by, broken, calibrated, drawn, limit, split_of
from catp_lightning import CrossAttentionCalibration, PruningPolicy, VQAModule
from catp_lightning.calibration.search.promise import GRID, Promise
from catp_lightning.data import PROMPTS, shipped
from catp_lightning.data.vqa import VQADataModule
from catp_lightning.utils.messages import quiet


def unequal(images: int = 600, kindest_first: bool = False) -> Answered:
    """Kinds of question that disagree on 0% to 24% of images at the smallest of three budgets; three texts a kind.

    With `kindest_first` the kind that never disagrees has the smallest checksums of texts.
    """
    rng = np.random.default_rng(0)
    share = np.array([0.0, 0.02, 0.08, 0.24])[:, None] * np.array([0.2, 0.6, 1.0])
    hard = rng.random((images, 4, 1))
    texts = rng.integers(-(2**63), 2**63 - 1, 12)
    texts = (np.sort(texts) if kindest_first else texts).reshape(4, 3)
    return Answered(hard >= share, texts[np.arange(4), rng.integers(0, 3, (images, 4))])


def test_each_question_of_an_image_is_as_likely_as_the_others_to_be_the_one_that_counts() -> None:
    asked = Answered(np.stack([np.arange(4)[None] != kind for kind in range(4)], -1).repeat(3000, 0), unequal().texts)
    texts = unequal(3000).texts
    counts = np.array(drawn(Answered(asked.same, texts), 3000, np.random.default_rng(1)))  # "disagree": of that kind
    assert counts.sum() == 3000 and np.abs(counts / 3000 - 0.25).max() < 0.04
    by_text = np.array(drawn(Answered(asked.same, texts), 3000, np.random.default_rng(1), by_text=True))
    assert np.abs(by_text / 3000 - 0.25).max() > 0.1, "or the draw by text would have done"


@pytest.mark.slow
@pytest.mark.parametrize("images", [150, 400, 800])
def test_a_promise_over_questions_of_unequal_kinds_is_kept(images: int) -> None:
    answered = unequal()
    assert answered.disagreement == pytest.approx([0.017, 0.051, 0.085], abs=0.012)
    promise = Promise(float(answered.disagreement[1]) - 1e-6, 0.95)  # the second budget is just not good enough
    assert broken(answered, promise, images, 200) <= limit(200)


def test_a_question_chosen_by_its_text_breaks_promises_and_the_simulation_sees_it() -> None:
    answered = unequal(kindest_first=True)
    promise = Promise(float(answered.disagreement[1]) - 1e-6, 0.95)
    count = broken(answered, promise, 400, 100, by_text=True)
    assert count > 60 and type(count) is int, "it is written as JSON"
    assert broken(answered, promise, 400, 100) <= limit(100)


@pytest.mark.slow
def test_promises_from_real_answers_of_four_kinds_of_question_are_kept(tmp_path: Path) -> None:
    model, console = "digits_blip2", Console(quiet=True)
    with quiet(ours=False):
        module = VQAModule(str(shipped(model)))
        policies = calibrated(module, model, tmp_path)
        answered = answered_by(module, model, split_of(model, tmp_path / "test", "test", 300, 0), policies, console)
    by_kind = 1 - answered.same.mean(0)
    assert np.ptp(by_kind[:, -1]) > 0.05, "kinds must differ, or this proves nothing"
    for most in (0.05, 0.09, 0.12):
        for images in CHECKED:
            assert broken(answered, Promise(most, 0.95), images, 2000) <= limit(2000), (most, images)


@pytest.mark.slow
def test_twenty_calibrations_keep_their_promise_on_new_images(tmp_path: Path) -> None:
    model, promise, images = "digits_blip2", 0.12, 320
    rule = PruningPolicy("stride")
    module, data = VQAModule(str(shipped(model))), {"batch_size": 64, "prompt": PROMPTS[model]}
    with quiet(ours=False):
        new = VQADataModule(
            str(shipped(model)), test=split_of(model, tmp_path / "new", "calibration", 750, 900), **data
        )
        batches = list(new.test_dataloader())
        full = predict(module, batches, None)
        truth = {keep: np.not_equal(predict(module, batches, rule.with_keep(keep)), full).mean() for keep in GRID}
        kept, budgets = 0, []
        for draw in range(20):
            own = split_of(model, tmp_path / f"draw-{draw}", "calibration", images, draw)
            loader = VQADataModule(str(shipped(model)), calibration=own, **data).calibration_dataloader()
            callback = CrossAttentionCalibration(
                tmp_path / f"policy-{draw}.json", keep=list(GRID), max_disagreement=promise, scorer="stride"
            )
            L.Trainer(**QUIET, callbacks=[callback]).predict(module, loader)
            (policy,) = callback.policies
            assert policy.evidence["promise"]["images"] > 100 and len(KINDS) == 4
            budgets.append(policy.keep)
            kept += policy.keep == 1.0 or bool(truth[policy.keep] <= promise)
    assert 20 - kept <= limit(20), (budgets, truth)
    assert any(keep != 1.0 for keep in budgets), "or nothing was promised"
