"""What is fitted never saw the images it answers, and is what slow fits find."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from catp_lightning.calibration.fit.fitting import Fitted, fit, fit_without, rounded
from catp_lightning.calibration.fit.heads import fit_heads
from catp_lightning.calibration.fit.probes import Columns, pair_rows, random_subset
from catp_lightning.calibration.fit.sums import FoldSums, ProbeSums
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.search.candidate import Candidate
from catp_lightning.calibration.search.candidates import fitted_candidates
from catp_lightning.calibration.settings import DEFAULTS
from catp_lightning.methods.scorers import CrossAttention, RegionAttention
from catp_lightning.models import Family
from tests.support.planted_fits import COLUMNS, TIES, probes

FOLDS = DEFAULTS.folds


SCORERS_FITTED = {"cross-attention": CrossAttention(), "region-attention": RegionAttention()}
"""Scorers of models with a Q-Former whose heads are fitted."""


CHANGED = 2  # the fold that is planted with other sums


def changed(sums: FoldSums, fold: int = CHANGED) -> FoldSums:
    """The same but for one fold, whose answers follow other rules by far."""
    rows, pairs, *_ = probes(noise=30.0, seed=1)
    other = rows if sums.gram.shape[1] == COLUMNS.total else pairs
    copy = FoldSums(*(part.copy() for part in (sums.gram, sums.moment, sums.squares, sums.rows)))
    copy.gram[fold], copy.moment[fold] = 3 * other.gram[fold], -20 * other.moment[fold]
    copy.squares[fold] = 400 * other.squares[fold]
    return copy


@pytest.mark.slow
def test_the_rules_for_a_fold_never_saw_it_and_the_final_ones_saw_all(family: Family, planted: Any) -> None:
    sums, pairs, *_ = planted
    fitted = fit(sums, pairs, COLUMNS, TIES)

    def rules(sums: FoldSums, pairs: FoldSums, fold: int) -> list[Candidate]:
        return fitted_candidates(Plan.of(family), fit_without(fold, sums, pairs, COLUMNS, fitted, TIES))

    names = [candidate.name for candidate in fitted_candidates(Plan.of(family), fitted)]
    for fold in range(FOLDS):
        before, after = rules(sums, pairs, fold), rules(changed(sums), changed(pairs), fold)
        assert [candidate.name for candidate in before] == [candidate.name for candidate in after] == names
        for one, other in zip(before, after, strict=True):
            assert (one == other) == (fold == CHANGED), one.name
    heads = fitted.scorers["region-attention"]
    assert heads.fit is not None and heads.layers == (0,)
    whole = fit_heads(sums, COLUMNS.of_heads("region-attention", (0,)), COLUMNS.of_slots)
    assert heads.head_weights(4) == [rounded(whole.weights)] and heads.slot_weights == rounded(whole.slots)


def test_what_a_slot_is_worth_is_scikit_learns_ridge_on_all_rows(planted: Any) -> None:
    sums, pairs, rows, gain = planted
    own = rows[:, COLUMNS.of_slots].numpy()
    ridge = Ridge(alpha=0.01 * np.diag(own.T @ own).mean(), fit_intercept=False).fit(own, gain.numpy())
    slots = fit(sums, pairs, COLUMNS, TIES).slots
    assert slots == rounded(ridge.coef_)
    assert sorted(range(8), key=lambda slot: slots[slot])[-1] == 3 and sorted(slots)[-1] > 2 * sorted(slots)[-2]


def test_nothing_that_can_be_learned_is_found_in_constant_answers(family: Family, planted: Any) -> None:
    sums, pairs = (replace(part, moment=0 * part.moment, squares=0 * part.squares) for part in planted[:2])
    fitted = fit(sums, pairs, COLUMNS, TIES)
    assert fitted.slots == [0.0] * 8 and not any(found.selected for found in fitted.scorers.values())
    names = {candidate.name for candidate in fitted_candidates(Plan.of(family), fitted)}
    assert not any("heads" in name for name in names)
    nothing = ProbeSums(COLUMNS.total).compute()  # a model with one visual token: there is nothing to probe
    assert fit(nothing, None, COLUMNS, TIES).greedy is None
    assert fit_without(0, nothing, None, COLUMNS, fitted, TIES).slots == [0.0] * 8


def quadratic_sums(value: np.ndarray, sizes: Sequence[int], samples: int = 120) -> tuple[FoldSums, FoldSums]:
    """Probes of a set function x' V x, with a little noise."""
    slots = len(value)
    columns = Columns(COLUMNS.scorers, slots)
    sums, pairs = ProbeSums(columns.total), ProbeSums(slots * (slots + 1) // 2)
    visual, fold = torch.ones(samples, slots, dtype=torch.bool), torch.arange(samples) % FOLDS
    for size in sizes:
        counts = torch.full((samples,), size)
        kept = torch.stack([random_subset(torch.arange(samples), visual, counts, 24 * size + n) for n in range(24)])
        kept = kept.double()
        gain = torch.einsum("pbs,st,pbt->pb", kept, torch.tensor(value), kept) + 0.05 * torch.randn(24, samples)
        sums.update(fold, torch.cat([torch.zeros(24, samples, 16), kept], 2), gain)
        pairs.update(fold, pair_rows(kept), gain)
    return sums.compute(), pairs.compute()


def order_of(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda slot: -scores[slot])


def brute_force(value: np.ndarray, steps: int) -> list[int]:
    chosen: list[int] = []
    for _ in range(steps):
        rest = [slot for slot in range(len(value)) if slot not in chosen]
        gains = [value[np.ix_([*chosen, slot], [*chosen, slot])].sum() for slot in rest]
        chosen.append(rest[int(np.argmax(gains))])
    return chosen


def test_the_fixed_set_is_the_greedy_set_of_the_planted_quadratic() -> None:
    """Slots 1 and 5 see the same, 2 and 7 are worth something only together: sums of single slots cannot tell."""
    value = np.diag([0.5, 3.0, 0.9, 0.2, 1.5, 2.8, 2.2, 0.0])
    value[1, 5] = value[5, 1] = -2.7 / 2  # 5 adds a tenth to 1
    value[2, 7] = value[7, 2] = 1.3 / 2
    value[4, 6] = value[6, 4] = -0.9 / 2
    sums, pairs = quadratic_sums(value, (4, 2, 1))
    fitted = fit(sums, pairs, COLUMNS, TIES)
    assert fitted.greedy is not None and sorted(fitted.greedy) == list(range(1, 9))
    assert order_of(fitted.greedy)[:5] == brute_force(value, 5) == [1, 6, 2, 7, 4]  # no probe kept more than four
    assert {1, 5} <= set(order_of(fitted.slots)[:3]), "each slot by itself: both of the redundant two"


@pytest.mark.slow
@settings(max_examples=15)
@given(st.integers(0, 10**6))
def test_the_fixed_set_is_nearly_as_good_as_the_best_greedy_one_of_any_quadratic(seed: int) -> None:
    generator = np.random.default_rng(seed)
    value = generator.normal(size=(8, 8)) / 3
    value = (value + value.T) / 2 + np.diag(generator.normal(size=8))
    greedy = fit(*quadratic_sums(value, (4, 2, 1), 60), COLUMNS, TIES).greedy
    assert greedy is not None
    for size in (1, 2, 3, 4):
        found, best = [order[:size] for order in (order_of(greedy), brute_force(value, 8))]
        worst = min(value[np.ix_(some, some)].sum() for some in ([*range(k, 8), *range(k)][:size] for k in range(8)))
        gap = value[np.ix_(best, best)].sum() - value[np.ix_(found, found)].sum()
        assert gap <= 0.15 * (value[np.ix_(best, best)].sum() - worst)


def test_pairs_are_counted_with_each_slot_itself() -> None:
    kept = torch.tensor([[1.0, 0.0, 1.0]])
    assert pair_rows(kept).tolist() == [[1, 0, 1, 0, 0, 1]]  # 00 01 02 11 12 22


def test_columns_stand_where_they_are_said_to() -> None:
    assert COLUMNS.total == 24 and COLUMNS.of_slots == list(range(16, 24))
    together = [column for name in SCORERS_FITTED for heads in COLUMNS.of_scorer(name) for column in heads]
    assert together == list(range(16)) and COLUMNS.of_heads("region-attention", (1,)) == [12, 13, 14, 15]
    fitted = Fitted([0.0] * 8)
    assert fitted.evidence(COLUMNS) == {"slots": [0.0] * 8}
