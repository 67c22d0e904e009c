"""Heads found from sums alone, on probes of a planted model."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import Lasso, Ridge

from catp_lightning.calibration.fit.heads import fit_heads
from catp_lightning.calibration.fit.sums import FoldSums, ProbeSums
from catp_lightning.calibration.settings import DEFAULTS
from tests.support.planted_heads import (
    HEADS,
    LAYERS,
    OTHER_LAYER,
    SAME_LAYER,
    SLOT_COLUMNS,
    SLOT_WORTH,
    SLOTS,
    batches,
    draw,
    found_layers,
    scaled,
    sums_of,
)

FOLDS = DEFAULTS.folds


@pytest.mark.parametrize(
    ("planted", "slots"),
    [(SAME_LAYER, ()), (OTHER_LAYER, SLOT_COLUMNS)],
    ids=["negative in the same layer", "in another layer, beside slots"],
)
def test_exactly_the_planted_heads_are_found_with_their_signs(planted, slots):
    slot_worth = SLOT_WORTH if len(slots) else None
    fits = [fit_heads(draw(seed, planted, slot_worth=slot_worth).sums, range(HEADS), slots) for seed in range(20)]
    true = np.array(list(planted.values()))
    for fit in fits:
        found = fit.weights[list(planted)]
        np.testing.assert_allclose(found / found[0], true / true[0], atol=0.15)
        assert fit.selected and fit.explained > 10 * fit.explained_error
    assert sum(set(np.flatnonzero(fit.weights)) == set(planted) for fit in fits) >= 17  # 95% of 150 others
    assert all((fit.stability[list(planted)] == 1).all() for fit in fits)
    assert all((fit.stability[fit.weights == 0] == 0).all() for fit in fits)


@pytest.mark.slow
def test_pure_noise_selects_nothing():
    draws = [draw(seed, {}).sums for seed in range(30)]
    fits = [fit_heads(sums, range(HEADS)) for sums in draws]
    assert sum(fit.selected for fit in fits) <= 2  # 3% of many more draws; at one standard error 7%
    assert sum(bool(found_layers(sums, LAYERS).layers) for sums in draws) <= 2
    nothing = next(fit for fit in fits if not fit.selected)
    assert nothing.strength == 1 and nothing.explained == 0 and not nothing.weights.any()


@pytest.mark.slow
def test_noise_around_slots_that_matter_selects_no_head():
    draws = [draw(seed, {}, slot_worth=SLOT_WORTH).sums for seed in range(20)]
    assert sum(fit_heads(sums, range(HEADS), SLOT_COLUMNS).selected for sums in draws) <= 2
    assert sum(bool(found_layers(sums, LAYERS, SLOT_COLUMNS).layers) for sums in draws) <= 2


def test_a_head_that_only_follows_the_slots_is_selected_without_them_and_not_beside_them():
    sums = draw(0, {5: 1.0}, slot_worth=3 * SLOT_WORTH, lean=2.0).sums  # the slots weigh more than the head
    alone, beside = fit_heads(sums, range(HEADS)), fit_heads(sums, range(HEADS), SLOT_COLUMNS)
    assert {0, 5} <= set(np.flatnonzero(alone.weights))
    assert set(np.flatnonzero(beside.weights)) == {5}
    assert set(found_layers(sums, LAYERS, SLOT_COLUMNS).layers) == {1}
    # as many tokens are kept by each probe: only differences between slots can be known
    np.testing.assert_allclose(beside.slots - beside.slots.mean(), 3 * SLOT_WORTH, atol=0.25)


@pytest.mark.parametrize("slots", [[], list(SLOT_COLUMNS)], ids=["heads alone", "beside slots"])
def test_the_explained_share_is_that_of_fits_on_the_rows_themselves(slots):
    data = draw(3, {4: 0.5, 5: 0.3, 11: -0.2}, slot_worth=SLOT_WORTH, noise=6.0)
    fit = fit_heads(data.sums, range(HEADS), slots)
    assert fit.selected

    heads = data.rows[:, :HEADS] / data.rows[:, :HEADS].std(0)
    beside = data.rows[:, slots]

    def residuals(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Heads and y without what the slots explain; a ridge is least squares with more rows."""
        ridge = np.eye(len(slots)) * np.sqrt(0.01 * (beside[rows] ** 2).sum(0).mean() if slots else 0)
        design, rest = np.r_[beside[rows], ridge], np.zeros((len(slots), HEADS))
        both = np.c_[np.r_[heads[rows], rest], np.r_[data.y[rows], rest[:, 0]]]
        both = both - design @ np.linalg.lstsq(design, both)[0] if slots else both
        return both[:, :-1], both[:, -1]

    def least_squares(rows: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, float]:
        """Head weights, and the squared error on the other rows."""
        x, z = residuals(rows)
        scale = 0.01 * (heads[rows][:, chosen] ** 2).sum(0).mean() if len(chosen) else 1.0
        weights = np.zeros(HEADS)
        if len(chosen):
            weights[chosen] = Ridge(alpha=scale, fit_intercept=False).fit(x[:, chosen], z).coef_
        rest = data.y - heads @ weights
        if slots:
            ridge = Ridge(alpha=0.01 * (beside[rows] ** 2).sum(0).mean(), fit_intercept=False)
            rest = rest - beside @ ridge.fit(beside[rows], rest[rows]).coef_
        return weights, float((rest[~rows] ** 2).sum())

    everything = np.ones(len(data.y), dtype=bool)
    x, z = residuals(everything)
    penalty = fit.strength * np.abs(x.T @ z).max() / len(data.y)
    saved, signs = 0.0, []
    for fold in range(FOLDS):
        rows = data.fold != fold
        x, z = residuals(rows)
        lasso = Lasso(alpha=penalty * rows.sum() / len(z), fit_intercept=False, tol=1e-10, max_iter=100_000).fit(x, z)
        weights, error = least_squares(rows, np.flatnonzero(lasso.coef_))
        saved += least_squares(rows, np.array([], dtype=int))[1] - error
        signs.append(np.sign(weights))
    assert fit.explained == pytest.approx(saved / (data.y**2).sum(), rel=1e-6)
    same = (np.array(signs) == np.sign(fit.weights)).mean(0)
    np.testing.assert_array_equal(fit.stability, np.where(fit.weights != 0, same, 0))
    final, _ = least_squares(everything, np.flatnonzero(fit.weights))
    np.testing.assert_allclose(fit.weights, final / data.rows[:, :HEADS].std(0), rtol=1e-6, atol=1e-12)


def test_sums_of_parts_are_one_pass():
    parts = [ProbeSums(HEADS + SLOTS) for _ in range(3)]
    for number, (fold, rows, gain) in enumerate(batches(2, OTHER_LAYER)):
        cut = 7 + 9 * number  # every batch is divided otherwise
        parts[number].update(fold[:cut], rows[:, :cut], gain[:, :cut])
        parts[number - 1].update(fold[cut:], rows[:, cut:], gain[:, cut:])
    merged, once = fit_heads(sums_of(*parts), range(HEADS), SLOT_COLUMNS), draw(2, OTHER_LAYER).sums
    whole = fit_heads(once, range(HEADS), SLOT_COLUMNS)
    np.testing.assert_allclose(merged.weights, whole.weights, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(sums_of(*parts).rows, once.rows)
    assert merged.strength == whole.strength and merged.explained == pytest.approx(whole.explained, rel=1e-9)


@pytest.mark.parametrize(("column", "factor"), [(4, 1e-4), (7, 1e4)], ids=["planted", "not planted"])
def test_the_unit_of_a_column_changes_nothing_but_its_weight(column, factor):
    sums = draw(4, OTHER_LAYER).sums
    before, after = (fit_heads(each, range(HEADS)) for each in (sums, scaled(sums, column, factor)))
    expected = before.weights.copy()
    expected[column] /= factor
    np.testing.assert_allclose(after.weights, expected, rtol=1e-6, atol=1e-12)
    assert after.strength == before.strength
    assert found_layers(scaled(sums, column, factor), LAYERS).layers == found_layers(sums, LAYERS).layers


def test_columns_come_in_the_callers_order():
    sums = draw(4, OTHER_LAYER).sums
    plain, turned = fit_heads(sums, range(HEADS)), fit_heads(sums, range(HEADS)[::-1])
    np.testing.assert_allclose(turned.weights[::-1], plain.weights, rtol=1e-9, atol=1e-12)
    assert set(found_layers(sums, LAYERS[::-1]).layers) == {3 - layer for layer in found_layers(sums, LAYERS).layers}


@pytest.mark.parametrize("tiny", [0.0, 1e-16], ids=["zero", "rounding left of a constant"])
def test_a_column_without_variance_gets_no_weight(tiny):
    sums = scaled(draw(5, OTHER_LAYER).sums, 5, tiny)  # a planted one: what is left of it still correlates
    fit = fit_heads(sums, range(HEADS))
    assert fit.weights[5] == 0 and set(np.flatnonzero(fit.weights)) >= {4, 11}
    assert np.isfinite(fit.weights).all() and set(found_layers(sums, LAYERS).layers) == {1, 2}


def test_a_copy_of_a_head_shares_its_place_without_harm():
    sums = draw(6, SAME_LAYER).sums
    index = [*range(HEADS), 4, 4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what scikit-learn thinks of copies is no news to a user
        fit, single = fit_heads(sums, index), fit_heads(sums, range(HEADS))
    assert fit.weights[[4, 16, 17]].sum() == pytest.approx(single.weights[4], rel=0.02)
    assert fit.explained == pytest.approx(single.explained, rel=0.02)
    assert found_layers(sums, [*LAYERS, LAYERS[1]]).layers == (1,)


def test_an_empty_fold_is_skipped_and_one_fold_alone_selects_nothing():
    sums = draw(7, OTHER_LAYER).sums

    def only(folds: int) -> FoldSums:
        there = np.arange(FOLDS) < folds
        arrays = (sums.gram, sums.moment, sums.squares, sums.rows)
        return FoldSums(*(np.where(there.reshape(-1, *[1] * (array.ndim - 1)), array, 0) for array in arrays))

    cut = FoldSums(sums.gram[:4], sums.moment[:4], sums.squares[:4], sums.rows[:4])
    assert fit_heads(only(4), range(HEADS)).explained == fit_heads(cut, range(HEADS)).explained > 0.3
    assert found_layers(only(4), LAYERS) == found_layers(cut, LAYERS)
    assert max(found_layers(only(4), LAYERS).stability) == 1
    for folds in (0, 1):
        fit = fit_heads(only(folds), range(HEADS), SLOT_COLUMNS)
        assert not fit.selected and fit.strength == 1 and np.isfinite(fit.slots).all()
        assert found_layers(only(folds), LAYERS, SLOT_COLUMNS).layers == ()


def test_answers_that_never_change_select_nothing():
    sums = draw(8, OTHER_LAYER).sums
    same = replace(sums, moment=sums.moment * 0, squares=sums.squares * 0)
    assert not fit_heads(same, range(HEADS), SLOT_COLUMNS).selected
    assert found_layers(same, LAYERS, SLOT_COLUMNS).layers == ()
