"""What a calibration says of the best control, and when it says that its evidence is thin."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from catp_lightning import PruningPolicy
from catp_lightning.calibration.report.controls import against, doubts, paired_difference, verdict
from catp_lightning.calibration.search.sums import ImageAgreement
from catp_lightning.calibration.split import part_of
from catp_lightning.callbacks import CrossAttentionCalibration
from tests.support.calibrations import QUICK, images_of
from tests.support.planted import Planted, agrees, finished, slot_3, two_questions
from tests.support.trainers import loading, trainer


def test_the_interval_of_a_paired_difference_covers_it_although_questions_of_an_image_hang_together() -> None:
    rng, covered, naive = np.random.default_rng(0), 0, 0
    for _ in range(500):
        questions = rng.integers(1, 7, 150)
        hard = rng.random(150) < 0.3  # on these images our answers are wrong together
        ours = np.where(hard, rng.binomial(questions, 0.2), questions)
        theirs = rng.binomial(questions, 0.76)
        _, (low, high) = paired_difference(questions, ours, theirs)
        covered += low <= 0.0 <= high  # 0.3 * 0.2 + 0.7 = 0.76: there is no difference
        single = np.ones(questions.sum(), dtype=int)  # as if each question had an image of its own
        flat = [
            np.concatenate([np.arange(n) < k for n, k in zip(questions, each, strict=True)]) for each in (ours, theirs)
        ]
        _, (low, high) = paired_difference(single, *flat)
        naive += low <= 0.0 <= high
    assert covered >= 463, "95% of 500, and three standard errors fewer"
    assert naive < covered - 25, "or images as clusters prove nothing"


def test_equal_answers_are_level_and_a_few_of_them_say_little() -> None:
    few, many = np.ones(5, dtype=int), np.ones(500, dtype=int)
    assert paired_difference(few, few, few)[0] == 0 and paired_difference(few, few, few)[1][1] > 0.2
    low, high = paired_difference(many, many, many)[1]
    assert -0.01 < low < 0 < high < 0.01 and verdict((low, high)) == "level"
    assert paired_difference(many, many, np.zeros(500, dtype=int))[1][1] <= 1.0


def test_answers_are_added_up_by_image_whatever_the_order_and_the_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(-3, 3, (40,), generator=generator)
    agreed = torch.rand(2, 3, 40, generator=generator) < 0.5
    one, several = ImageAgreement(2, 3), ImageAgreement(2, 3)
    one.update(images, agreed)
    for index in torch.randperm(40, generator=generator).split(7):
        several.update(images[index], agreed[:, :, index])
    questions, same = one.compute()
    assert all(np.array_equal(a, b) for a, b in zip(several.compute(), (questions, same), strict=True))
    for row, image in enumerate(sorted(set(images.tolist()))):
        assert questions[row] == (images == image).sum()
        assert np.array_equal(same[row], agreed[:, :, images == image].sum(2).numpy())


@pytest.mark.parametrize("planted", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_policy_carries_its_difference_to_the_best_control_paired_by_image(planted: bool) -> None:
    module, batches = Planted(slot_3 if planted else _first), two_questions(40, 40)
    calibrator = finished(module, batches, [2], settings=replace(QUICK, checked=0.4))
    images, checked = images_of(batches), part_of(images_of(batches), 0.4) == 1
    (policy,), (chosen,) = calibrator.policies(), calibrator.result.chosen
    (point,) = policy.evidence["retention"]
    same = {
        n: agrees(module, candidate.policy(2), batches)[checked]
        for n, candidate in enumerate(calibrator.result.candidates)
        if n == chosen or (candidate.control and candidate.reference)
    }
    rivals = {calibrator.result.candidates[n].name: agreed for n, agreed in same.items() if n != chosen}
    best = max(agreed.double().mean() for agreed in rivals.values())
    named = point["best_control"]
    assert rivals[named["name"]].double().mean() == best == pytest.approx(named["agreement"])
    assert named["difference"] == pytest.approx(float(same[chosen].double().mean() - best))
    several = [images[checked] == image for image in images[checked].unique()]
    by_image = [
        np.array([int(values[own].sum()) for own in several])
        for values in (torch.ones_like(same[chosen]), same[chosen], rivals[named["name"]])
    ]
    assert named["interval"] == pytest.approx(list(paired_difference(*by_image)[1]))
    assert named["verdict"] == verdict(named["interval"])
    assert planted == (named["verdict"] == "ahead"), "slot 3 is no control's; the first token is that of `position`"


def _first(outputs: Tensor) -> Tensor:
    return torch.eye(outputs.shape[1], dtype=outputs.dtype)[0].expand(outputs.shape[:2])


def policy_with(checked: int, agreement: float, difference: float, interval: tuple[float, float]) -> PruningPolicy:
    best = {"name": "divprune", "agreement": 0.9, "difference": difference, "interval": interval}
    best["verdict"] = verdict(interval)
    point = {"keep": 0.5, "chosen": "x", "agreement": agreement, "interval": [0.1, 0.9], "best_control": best}
    return PruningPolicy(keep=0.5, evidence={"samples": {"learn": 9, "check": checked}, "retention": [point]})


def test_doubts_are_few_answers_a_better_control_and_answers_that_are_mostly_others() -> None:
    assert not list(doubts([policy_with(64, 0.9, 0.0, (-0.01, 0.01))]))
    (thin,) = doubts([policy_with(8, 0.9, 0.1, (0.0, 0.2))])
    assert "checked on 8 answers, fewer than 64 (90% at keep 0.5 may be 10% to 90%)" in thin and "8 times" in thin
    (behind,) = doubts([policy_with(400, 0.9, -0.019, (-0.035, -0.003))])
    assert "behind the control divprune on the 400 checked answers, by 1.9%" in behind and "Use that control" in behind
    (level,) = doubts([policy_with(400, 0.9, -0.004, (-0.02, 0.012))])
    assert "they are level" in level and "Use that control" not in level
    (lost,) = doubts([policy_with(400, 0.0, 0.0, (-0.01, 0.01))])
    assert "only 0% of the checked answers are the unpruned model's" in lost
    assert not list(doubts([policy_with(8, 0.0, -0.5, (-0.6, -0.4)).with_keep(1.0)])), "a budget that was not chosen"


def test_what_stands_beside_a_choice_in_words() -> None:
    point = policy_with(400, 0.9, -0.019, (-0.035, -0.003)).evidence["retention"][0]
    assert against(point) == "behind divprune (-1.9%, -3.5% to -0.3%)"
    assert against({**point, "best_control": None}) == ""


@pytest.mark.slow
def test_a_calibration_on_a_few_images_warns_and_still_saves(tmp_path: Path) -> None:
    callback = CrossAttentionCalibration(tmp_path / "policies", keep=[2, 1], settings=QUICK)
    with pytest.warns(UserWarning, match="Calibration evidence is thin: agreement was checked on"):
        trainer(callback).predict(Planted(slot_3), loading(two_questions(20, 20)))
    assert len(list(tmp_path.rglob("keep-*.json"))) == 2


def test_a_calibration_for_more_tokens_than_an_image_has_says_so_before_it_measures(tmp_path: Path) -> None:
    callback = CrossAttentionCalibration(tmp_path / "policies", keep=[64, 2], scorer="stride", settings=QUICK)
    with pytest.warns(UserWarning, match=r"keep is 64 tokens, and every image of .* has 8"):
        trainer(callback).predict(Planted(slot_3), loading(two_questions(20, 20)))
