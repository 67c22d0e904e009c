"""A promise is tested on one question of each image that nothing was decided on, from the largest budget down."""

from pathlib import Path

import pytest
import torch

from catp_lightning import PolicyError, PruningPolicy, TokenPruning
from catp_lightning.calibration.search.promise import Promise, upper_bound
from catp_lightning.calibration.split import part_of
from catp_lightning.callbacks import CrossAttentionCalibration
from tests.support.calibrations import QUICK, data, images_of
from tests.support.models import faint_blip2
from tests.support.modules import Generating
from tests.support.planted import Planted, agrees, finished, slot_3, two_questions
from tests.support.trainers import loading, trainer


@pytest.mark.slow
def test_a_promise_is_tested_on_one_question_of_each_image_of_the_checking_part() -> None:
    module, batches = Planted(slot_3), two_questions(70, 70)
    promise = Promise(0.35, 0.9)
    calibrator = finished(module, batches, [4, 2, 1], promise, QUICK)
    (policy,) = calibrator.policies()
    shown = policy.evidence["promise"]
    draws = torch.cat([some.keys for some in calibrator.samples])
    images = images_of(batches)
    checked = [image for image in images.unique().tolist() if part_of(torch.tensor([image]), 0.5).item()]
    first = [min((images == image).nonzero()[:, 0].tolist(), key=lambda n: int(draws[n])) for image in checked]
    assert shown["images"] == len(first) == len(set(first)) and policy.evidence["samples"]["check"] == 2 * len(first)
    assert {number < 70 for number in first} == {True, False}, "sometimes the first question, sometimes the second"
    holding = []
    for step, keep, chosen in zip(shown["steps"], (4, 2, 1), calibrator.result.chosen, strict=True):
        same = agrees(module, calibrator.result.candidates[chosen].policy(keep), batches)
        assert step["keep"] == keep and step["disagreed"] == int((~same[first]).sum())
        assert step["bound"] == pytest.approx(upper_bound(step["disagreed"], len(first), 0.9))
        holding.append(step["bound"] <= 0.35)
    assert holding[0] and policy.keep == [4, 2, 1][holding.index(False) - 1 if False in holding else 2]
    assert policy.evidence["chosen"] == policy.evidence["candidates"][0]["name"]


@pytest.mark.slow
def test_budgets_of_a_promise_are_walked_from_the_largest(tmp_path: Path) -> None:
    callback = CrossAttentionCalibration(
        tmp_path / "p.json", keep=[1, 6, 2, 0.75], max_disagreement=0.6, confidence=0.5, settings=QUICK
    )
    trainer(callback).predict(Planted(slot_3), loading(data(40, 40, torch.float64)))
    (policy,) = callback.policies
    steps = policy.evidence["promise"]["steps"]
    assert [step["keep"] for step in steps] == [6, 2, 1], "0.75 of 8 is 6 again"
    held = [step["keep"] for step in steps if step["holds"]]
    assert policy.keep == held[-1] == PruningPolicy.load(tmp_path / "p.json").keep


def test_where_no_budget_holds_the_policy_prunes_nothing_and_can_be_used(tmp_path: Path) -> None:
    module, batches = Generating(faint_blip2(dtype=torch.float64)), data(40, 20, torch.float64)
    module.net.language_projection.weight.data *= 20  # hardly an answer survives
    callback = CrossAttentionCalibration(
        tmp_path / "p.json", keep=[2, 1], scorer="catp", max_disagreement=0.2, confidence=0.5, settings=QUICK
    )
    trainer(callback).predict(module, loading(batches))
    (policy,) = callback.policies
    assert policy.keep == 1.0 and policy.evidence["chosen"] == "no pruning" and not policy.evidence["control"]
    assert not any(step["holds"] for step in policy.evidence["promise"]["steps"])
    predictions = trainer(TokenPruning(tmp_path / "p.json")).predict(module, loading(batches))
    assert predictions is not None
    with torch.no_grad():
        assert all(torch.equal(found, module.predict_step(b, 0)) for found, b in zip(predictions, batches, strict=True))


def test_too_few_images_for_a_promise_are_refused_with_the_numbers(tmp_path: Path) -> None:
    batches = two_questions(30, 20)
    checked = int((part_of(images_of(batches).unique(), 0.5) == 1).sum())
    with pytest.raises(PolicyError, match=rf"There are {checked} images to test .* at least 149, .* 236 for one"):
        finished(Generating(faint_blip2(dtype=torch.float64)), batches, [4, 2], Promise(0.02))
    assert 5 < checked < 25, "images, not questions"
