"""Counts by question: fitted to what answers lose around a budget, and chosen only where they lose less."""

import numpy as np
import pytest
import torch
from torch import Tensor

from catp_lightning.calibration.search.candidate import Candidate
from catp_lightning.calibration.search.counts import SLOPE, Curves, _chosen, loss_by_question
from catp_lightning.calibration.search.standings import Final
from catp_lightning.calibration.settings import CalibrationSettings
from catp_lightning.calibration.split import part_of
from catp_lightning.errors import PolicyError
from catp_lightning.methods.counts import MOST
from catp_lightning.pruning.pruner import applied
from tests.support.modules import Batch
from tests.support.planted import AskedPlanted, Finished, agrees, asking, finished, slot_3, where
from tests.support.questions import components

COUNTS = np.array([2, 3, 4, 6, 8, 11, 16, 23])


def curves(hardness: float, slope: float = 1.5, samples: int = 400, noise: float = 0.5, budget: int = 4) -> Curves:
    """Samples whose loss falls as a power of the number of tokens; how much depends on the first component."""
    draw = np.random.default_rng(0)
    questions = draw.standard_normal((samples, 2))
    expected = np.exp(hardness * questions[:, :1]) * COUNTS**-slope
    divergence = expected * draw.gamma(1 / noise, noise, expected.shape)
    images = np.repeat(draw.integers(0, 2**62, samples // 2), 2)
    return Curves(COUNTS, budget, 32, images, questions, divergence, (divergence < 0.1).astype(float))


def everyone(found: Curves) -> np.ndarray:
    return np.ones(len(found.images), bool)


def test_hardness_and_slope_are_found() -> None:
    found = curves(0.8, samples=4000)
    hardness, slope = loss_by_question(found.questions, COUNTS, found.divergence)
    assert slope == pytest.approx(1.5, rel=0.1)
    assert hardness[0] == pytest.approx(0.8, rel=0.15) and abs(hardness[1]) < 0.05
    nothing = np.zeros_like(found.divergence)
    hardness, slope = loss_by_question(found.questions, COUNTS, nothing)
    assert np.abs(hardness).max() < 0.01 and slope >= SLOPE and np.isfinite(slope), "nothing is lost"


def test_the_mean_count_is_the_budget_and_no_larger_constant_keeps_it() -> None:
    found = curves(0.8)
    weights = found.weights(everyone(found))
    logarithms = found.questions @ weights[:-1]

    def mean(constant: float) -> float:
        multiples = np.exp(np.clip(logarithms + constant, -np.log(MOST), np.log(MOST)))
        return float(np.clip(np.floor(8 * multiples + 0.5), 1, 32).mean())

    assert mean(weights[-1]) <= 8 < mean(weights[-1] + 0.01) and mean(weights[-1]) > 7.9


def test_these_counts_lose_less_than_others_at_the_same_mean() -> None:
    """Against counts that follow hardness more, less, or not at all, on the losses that are expected."""
    found = curves(1.0, noise=0.01)
    hardness, slope = loss_by_question(found.questions, COUNTS, found.divergence)
    level = found.questions @ hardness

    def loss(exponent: float) -> float:
        multiples = np.exp(exponent * level)
        counts = 8 * multiples / multiples.mean()
        return float((np.exp(level) * counts**-slope).mean())

    weights = found.weights(everyone(found))
    exponent = float(weights[:-1] @ hardness / (hardness @ hardness))
    assert exponent == pytest.approx(1 / (1 + slope))
    assert loss(exponent) < min(loss(0.0), loss(0.7 * exponent), loss(1 / slope))


def final() -> Final:
    sums = {name: np.zeros((1, 1)) for name in ("divergence", "squares", "agreed", "count")}
    return Final([Candidate("l2-norm", "l2-norm")], [0], sums)


def test_counts_are_chosen_where_questions_differ_and_not_where_they_do_not() -> None:
    for found, ahead in ((curves(1.0), True), (curves(0.0), False), (curves(0.0, noise=3.0), False)):
        one = _chosen(final(), 0, found, components(), 5)
        assert (one.chosen != [0]) is ahead
        if ahead:
            assert one.candidates[1].name == "l2-norm, counts by question" and one.compared == [0]
            assert one.sums["divergence"][0, 1] < found.divergence[:, found.budget].sum()
            policy = one.candidates[1].policy(0.25)
            assert policy.keep == 0.25 and policy.counts is not None and len(policy.counts["weights"]) == 3


def test_what_is_chosen_does_not_depend_on_the_answers_of_its_own_fold() -> None:
    """Losses that say nothing of others: were a sample's own answers read, counts would seem ahead."""
    draw, ahead = np.random.default_rng(1), 0
    for _ in range(20):
        level = draw.gamma(0.1, 10, (60, 1))
        questions, images = draw.standard_normal((60, 16)), draw.integers(0, 2**62, 60)
        divergence = level * COUNTS**-1.0
        found = Curves(COUNTS, 4, 32, images, questions, divergence, divergence * 0)
        ahead += _chosen(final(), 0, found, components(16), 5).chosen != [0]
    assert ahead <= 4


def test_the_setting_is_true_or_false() -> None:
    with pytest.raises(PolicyError, match="counts is 'yes'; it is True or False"):
        CalibrationSettings(counts="yes")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def asked() -> tuple[AskedPlanted, list[Batch], Finished]:
    """One kind of question is answered from one token, the other from all: a calibration at 3 of 8 tokens."""
    torch.manual_seed(0)
    module = AskedPlanted(slot_3, lambda outputs: torch.ones_like(outputs[..., 0]))
    batches, fresh = asking(72, 24)
    return module, fresh, finished(module, batches, [3], settings=CalibrationSettings(probes=2, counts=True))


@pytest.mark.slow
def test_a_calibration_spends_tokens_on_the_questions_that_need_them(
    asked: tuple[AskedPlanted, list[Batch], Finished],
) -> None:
    module, fresh, found = asked
    (policy,) = found.policies()
    assert policy.keep == 3 and policy.counts is not None
    assert policy.evidence["chosen"].endswith(", counts by question")
    checked = [row["name"] for row in policy.evidence["candidates"] if row["check"] is not None]
    assert policy.evidence["chosen"].removesuffix(", counts by question") in checked, "fixed counts stand beside it"
    kept: list[Tensor] = []
    with torch.no_grad(), applied(module, policy, on_prefill=lambda prefill: kept.append(prefill.keep.sum(1))):
        for batch in fresh:
            module.predict_step(batch)
    counts, one = torch.cat(kept).double(), torch.cat([batch["input_ids"][:, -1] == 50 for batch in fresh])
    assert counts[one].mean() + 1 < counts[~one].mean() and counts.mean() == pytest.approx(3, abs=0.3)


def test_its_answers_are_those_that_the_policy_gives_in_use(asked: tuple[AskedPlanted, list[Batch], Finished]) -> None:
    module, _, found = asked
    (policy,) = found.policies()
    batches = [
        batch for batch in where(asking(72, 24)[0], lambda images: part_of(images) == 1) if len(batch["input_ids"])
    ]
    same = agrees(module, policy, batches)
    row = next(row for row in policy.evidence["candidates"] if row["name"] == policy.evidence["chosen"])
    assert row["check"] is not None and row["check"]["samples"] == len(same)
    assert row["check"]["agreement"] == pytest.approx(float(same.double().mean()))
