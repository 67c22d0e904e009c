"""What is equal but for rounding is decided by name or place."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from catp_lightning.calibration.fit.ties import Tolerance
from catp_lightning.calibration.search.choice import NOTHING
from tests.support.calibrations import QUICK, data
from tests.support.models import faint_blip2
from tests.support.modules import Generating
from tests.support.planted import finished

FLOAT32 = Tolerance.under(torch.float32)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_noise_far_below_a_tie_changes_an_order_only_where_two_are_a_tie_apart(values: list[float], noise) -> None:
    moved = [value + noise.uniform(-1, 1) * 1e-3 * FLOAT32.relative * max(value, 1.0) for value in values]
    gaps = [abs(a - b) / max(a, b, 1.0) for a, b in itertools.combinations(values, 2)]
    if not any(0.9 * FLOAT32.relative < gap < 1.1 * FLOAT32.relative for gap in gaps):
        assert FLOAT32.order(values, 1.0) == FLOAT32.order(moved, 1.0)


@given(st.lists(st.floats(0, 10), max_size=8))
def test_without_ties_it_is_a_stable_sort(values: list[float]) -> None:
    assert Tolerance(0.0).order(values, 1.0) == sorted(range(len(values)), key=lambda place: values[place])


def test_a_chain_of_close_values_is_not_one_tie() -> None:
    chain = [1 + 0.9e-4 * step for step in range(6)]
    assert FLOAT32.order(chain[::-1], 0.0) == [4, 5, 2, 3, 0, 1], "two at a time, each led by its smallest"


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "by_name"), [(torch.float32, True), (torch.float64, False)])
def test_candidates_that_diverge_equally_within_rounding_go_by_name(dtype: torch.dtype, by_name: bool) -> None:
    calibrator = finished(Generating(faint_blip2(dtype=dtype)), data(12, 12, dtype), [4], settings=QUICK)
    standings = calibrator.standings
    sums: Any = standings.rounds[0].sums
    alive = list(range(len(standings.candidates)))
    names = [candidate.name for candidate in standings.candidates]
    for reduced in standings.rounds:
        reduced.sums["count"][0] = 10
        reduced.sums["divergence"][0] = 10.0
    for better, size in enumerate(sorted(alive, key=names.__getitem__, reverse=True)):
        sums["divergence"][0][size] -= 1e-7 * better  # the first name diverges least, by next to nothing
    sums["divergence"][0] *= -1
    sums["divergence"][0] += 20  # now it diverges most
    ranking = [names[number] for number in standings.ranking(0, alive)]
    assert ranking == sorted(names, reverse=not by_name)


def test_differences_of_almost_nothing_are_rounding() -> None:
    assert FLOAT32.order([2e-7, 0.0, 1e-7], NOTHING) == [0, 1, 2]
    assert FLOAT32.order([2e-5, 0.0, 1e-5], NOTHING) == [1, 2, 0]
