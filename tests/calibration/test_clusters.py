"""The bound of the share of questions, where several about one image are answered together."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from catp_lightning.calibration.search.clusters import STAKES, betting_bound, cluster_bound
from catp_lightning.calibration.search.promise import Promise, upper_bound

Clusters = tuple[np.ndarray, np.ndarray]  # questions and disagreements of each image
RNG = np.random.default_rng


def drawn_from(questions: np.ndarray, disagreed: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One question of each image drawn at random, 1 where it disagrees, and a place for each image."""
    return (rng.random(len(questions)) * questions < disagreed).astype(int), rng.random(len(questions))


@pytest.mark.slow
@given(st.integers(1, 300), st.floats(0, 1), st.floats(0.5, 0.99))
def test_with_one_question_about_each_image_it_is_the_binomial_bound(images: int, share: float, level: float) -> None:
    ones, disagreed = np.ones(images, dtype=int), (np.arange(images) < round(share * images)).astype(int)
    places = np.linspace(0, 0.999, images)
    assert cluster_bound(ones, disagreed, disagreed, places, 1, level) == upper_bound(disagreed.sum(), images, level)


@pytest.mark.slow
@given(st.integers(0, 2**31), st.integers(2, 9))
def test_the_bet_is_worth_the_inverse_of_the_risk_at_its_bound(seed: int, most: int) -> None:
    rng = RNG(seed)
    questions = rng.integers(1, most + 1, 80)
    disagreed = rng.binomial(questions, 0.1)
    bound = betting_bound(questions, disagreed, most, 0.95)
    factors = [1 + s * (bound * questions - disagreed) / ((1 - bound) * most) for s in STAKES]
    assert np.mean([np.prod(each) for each in factors]) == pytest.approx(20, rel=1e-6)
    assert min(map(np.min, factors)) >= -1e-9, "a bet may lose all, not more"
    order = rng.permutation(80)
    assert betting_bound(questions[order], disagreed[order], most, 0.95) == pytest.approx(bound, abs=1e-12)


@pytest.mark.slow
@given(st.integers(0, 2**31))
def test_each_disagreement_loosens_the_bound(seed: int) -> None:
    rng = RNG(seed)
    questions, disagreed = np.full(100, 3), rng.binomial(3, 0.05, 100)
    more = disagreed + (np.arange(100) == disagreed.argmin())
    assert betting_bound(questions, more, 3, 0.95) > betting_bound(questions, disagreed, 3, 0.95)
    assert betting_bound(questions, disagreed, 3, 0.99) > betting_bound(questions, disagreed, 3, 0.95)
    assert betting_bound(questions, disagreed, 6, 0.95) > betting_bound(questions, disagreed, 3, 0.95)


def test_two_tests_share_the_risk_and_either_may_decide() -> None:
    four, places = np.full(200, 4), np.zeros(200)
    for differing, decides in ((4, 0), (1, 1)):  # all answers of eight images, or one of each
        one = (np.arange(200) < 8).astype(int)
        bounds = upper_bound(8, 200, 0.975), betting_bound(four, differing * one, 4, 0.975)
        assert cluster_bound(four, differing * one, one, places, 4, 0.95) == min(bounds) == bounds[decides]


def test_where_all_or_nothing_was_seen_the_bound_is_one() -> None:
    four = np.full(20, 4)
    assert cluster_bound(four, four, four * 0 + 1, four * 0.0, 4, 0.95) == 1.0
    assert cluster_bound(four[:0], four[:0], four[:0], four[:0] * 0.0, 4, 0.95) == 1.0


def test_images_are_taken_as_often_as_they_are_asked_about() -> None:
    """The images with few questions disagree; the share over questions is far below that over images."""
    rng = RNG(0)
    questions = np.where(np.arange(4000) % 2, 9, 1)
    disagreed = np.where(np.arange(4000) % 2, 0, 1)
    bound = cluster_bound(questions, disagreed, *drawn_from(questions, disagreed, rng), 9, 0.95)
    assert 0.1 < bound < 0.13 and disagreed.sum() / questions.sum() == 0.1


def together(share: float, rng: np.random.Generator, images: int) -> Clusters:
    """Four questions about each image, whose answers change all or not at all."""
    return np.full(images, 4), 4 * rng.binomial(1, share, images)


def apart(share: float, rng: np.random.Generator, images: int) -> Clusters:
    """Four questions about each image, independent of each other."""
    return np.full(images, 4), rng.binomial(4, share, images)


def harder_where_more(share: float, rng: np.random.Generator, images: int) -> Clusters:
    """One to eight questions; the more, the more likely that all change. E[n * n] / E[n] = 17 / 3."""
    questions = rng.integers(1, 9, images)
    return questions, questions * rng.binomial(1, share * questions * 3 / 17)


def harder_where_fewer(share: float, rng: np.random.Generator, images: int) -> Clusters:
    """One question or seven; only single ones change. E[n] = 4."""
    questions = np.where(rng.random(images) < 0.5, 7, 1)
    return questions, np.where(questions == 1, rng.binomial(1, 8 * share, images), 0)


def rare_and_large(share: float, rng: np.random.Generator, images: int) -> Clusters:
    """One question or, rarely, eight, which change together. With a part r of eight the share is 8 r / (1 + 7 r)."""
    large = rng.random(images) < share / (8 - 7 * share)
    return np.where(large, 8, 1), np.where(large, 8, 0)


def single(share: float, rng: np.random.Generator, images: int) -> Clusters:
    return np.ones(images, dtype=int), rng.binomial(1, share, images)


STRUCTURES: dict[Callable[..., Clusters], int] = {
    together: 4,
    apart: 4,
    harder_where_more: 8,
    harder_where_fewer: 7,
    rare_and_large: 8,
    single: 1,
}


def held(structure: Callable[..., Clusters], share: float, promise: Promise, images: int, redraws: int) -> int:
    """Number of redraws in which the promise over questions is found to hold."""
    rng, count = RNG(7), 0
    for _ in range(redraws):
        questions, disagreed = structure(share, rng, images)
        sampled = drawn_from(questions, disagreed, rng)
        count += promise.holds(cluster_bound(questions, disagreed, *sampled, STRUCTURES[structure], promise.confidence))
    return count


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_structures_disagree_as_they_say(structure: Callable[..., Clusters]) -> None:
    questions, disagreed = structure(0.1, RNG(0), 200_000)
    assert disagreed.sum() / questions.sum() == pytest.approx(0.1, abs=0.004)
    assert (disagreed <= questions).all() and questions.max() == STRUCTURES[structure]


def test_a_few_large_images_that_change_are_not_overlooked() -> None:
    """Over images their share is an eighth of what it is over questions."""
    assert held(rare_and_large, 0.1, Promise(0.0999, 0.95, "questions"), 600, 100) <= binom.ppf(0.999, 100, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("share", "images"), [(0.02, 200), (0.02, 800), (0.1, 60), (0.1, 300), (0.1, 1000)])
def test_a_share_just_above_the_promise_is_found_to_hold_in_at_most_five_of_a_hundred_redraws(
    structure: Callable[..., Clusters], share: float, images: int
) -> None:
    found = held(structure, share, Promise(share * (1 - 1e-9), 0.95, "questions"), images, 2000)
    assert found <= binom.ppf(0.999, 2000, 0.05)


@pytest.mark.slow
def test_a_binomial_test_of_all_questions_would_break_the_promise() -> None:
    """Answers that change together are no independent draws: the structures above can tell a wrong test."""
    rng, found = RNG(7), 0
    for _ in range(500):
        questions, disagreed = together(0.1, rng, 100)
        found += upper_bound(int(disagreed.sum()), int(questions.sum()), 0.95) < 0.1
    assert found > 2 * binom.ppf(0.999, 500, 0.05)


@pytest.mark.slow
def test_power_is_that_of_images_with_one_question_and_more_where_answers_are_apart() -> None:
    promise, images, redraws = Promise(0.05, 0.95, "questions"), 200, 400
    over_images = sum(
        binom.pmf(k, images, 0.0125) for k in range(images) if promise.holds(upper_bound(k, images, 0.95))
    )
    power = {structure: held(structure, 0.0125, promise, images, redraws) / redraws for structure in STRUCTURES}
    assert power[single] == pytest.approx(over_images, abs=0.06)
    assert power[apart] > over_images + 0.05
    assert power[together] > over_images - 0.2
