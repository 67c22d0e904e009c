"""Heads and layers found from sums alone, on probes of a planted model."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso, Ridge

from catp_lightning.calibration.fit.heads import GATE, STRENGTHS, describe_heads, fit_heads
from catp_lightning.calibration.fit.layers import LayerChoice, choose_layers
from catp_lightning.calibration.fit.sums import FOLDS, FoldSums, ProbeSums
from catp_lightning.calibration.fit.ties import Tolerance

HEADS, SLOTS, TOKENS, PROBES, BATCH = 16, 8, 16, 16, 40
EXACT = Tolerance(0.0)
LAYERS = [list(range(first, first + 4)) for first in range(0, HEADS, 4)]
SLOT_COLUMNS = range(HEADS, HEADS + SLOTS)
SLOT_WORTH = np.linspace(-1, 1, SLOTS)
SAME_LAYER, OTHER_LAYER = {4: 1.0, 5: 0.6, 6: -0.8}, {4: 1.0, 5: 0.6, 11: -0.8}


def found_layers(
    sums: FoldSums, layers: Sequence[Sequence[int]], slots: Sequence[int] = (), ties: Tolerance = EXACT
) -> LayerChoice:
    return choose_layers(sums, layers, slots, ties)


@dataclass(frozen=True)
class Draw:
    """Probes of a planted model: their sums, and the centred rows themselves."""

    sums: FoldSums
    rows: np.ndarray  # [N, HEADS + SLOTS]
    y: np.ndarray  # [N]
    fold: np.ndarray  # [N]


def sums_of(*parts: ProbeSums) -> FoldSums:
    """The sums of several processes, added as their declared reduction adds them."""
    whole = ProbeSums(parts[0].moment.shape[1])
    for name in ("gram", "moment", "squares", "rows"):
        setattr(whole, name, sum(getattr(part, name) for part in parts))
    return whole.compute()


def batches(
    seed: int, worth: dict[int, float], *, slot_worth: np.ndarray | None = None, noise: float = 2.0, lean: float = 0.0
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Three batches of fold [B], rows [P, B, HEADS + SLOTS] and gain [P, B].

    Half of the tokens of every sample are kept at random. The votes of a token share a component among heads, as real
    heads agree; `lean` makes the votes of head 0 follow the token's slot.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([worth.get(head, 0.0) for head in range(HEADS)], dtype=torch.float64)
    slot = torch.arange(TOKENS) % SLOTS
    made = []
    for _ in range(3):
        votes = torch.randn(BATCH, TOKENS, HEADS, generator=generator, dtype=torch.float64)
        votes = votes + 0.5 * torch.randn(BATCH, TOKENS, 1, generator=generator, dtype=torch.float64)
        votes[:, :, 0] += lean * torch.from_numpy(SLOT_WORTH)[slot]
        votes = (votes - votes.mean(1, keepdim=True)) / votes.std(1, keepdim=True)
        draws = torch.rand(PROBES, BATCH, TOKENS, generator=generator)
        kept = (draws.argsort(-1).argsort(-1) < TOKENS // 2).double()
        heads = torch.einsum("pbt,bth->pbh", kept, votes)
        slots = kept.reshape(PROBES, BATCH, TOKENS // SLOTS, SLOTS).sum(2)
        level = 3 * torch.randn(BATCH, generator=generator, dtype=torch.float64)  # some answers are surer than others
        gain = heads @ weights + level + noise * torch.randn(PROBES, BATCH, generator=generator, dtype=torch.float64)
        if slot_worth is not None:
            gain = gain + slots @ torch.from_numpy(slot_worth)
        fold = torch.randint(0, FOLDS, (BATCH,), generator=generator)
        made.append((fold, torch.cat([heads, slots], -1), gain))
    return made


def draw(seed: int, worth: dict[int, float], **settings: object) -> Draw:
    metric, parts = ProbeSums(HEADS + SLOTS), batches(seed, worth, **settings)
    for batch in parts:
        metric.update(*batch)
    rows = np.concatenate([(rows - rows.mean(0)).flatten(0, 1).numpy() for _, rows, _ in parts])
    y = np.concatenate([(gain - gain.mean(0)).flatten().numpy() for _, _, gain in parts])
    fold = np.concatenate([fold.expand(PROBES, -1).flatten().numpy() for fold, _, _ in parts])
    return Draw(sums_of(metric), rows, y, fold)


def scaled(sums: FoldSums, column: int, factor: float) -> FoldSums:
    """The sums had the column come in another unit."""
    units = np.ones(sums.moment.shape[1])
    units[column] = factor
    return replace(sums, gram=sums.gram * units * units[:, None], moment=sums.moment * units)


@pytest.mark.parametrize("planted", [SAME_LAYER, OTHER_LAYER], ids=["negative in the same layer", "in another layer"])
@pytest.mark.parametrize("slots", [(), SLOT_COLUMNS], ids=["heads alone", "beside slots"])
def test_exactly_the_planted_heads_are_found_with_their_signs(planted, slots):
    slot_worth = SLOT_WORTH if len(slots) else None
    fits = [fit_heads(draw(seed, planted, slot_worth=slot_worth).sums, range(HEADS), slots) for seed in range(40)]
    true = np.array(list(planted.values()))
    for fit in fits:
        found = fit.weights[list(planted)]
        np.testing.assert_allclose(found / found[0], true / true[0], atol=0.15)
        assert fit.selected and fit.explained > 10 * fit.explained_error
    assert sum(set(np.flatnonzero(fit.weights)) == set(planted) for fit in fits) >= 34  # 95% of 150 others
    assert all((fit.stability[list(planted)] == 1).all() for fit in fits)
    assert all((fit.stability[fit.weights == 0] == 0).all() for fit in fits)


@pytest.mark.parametrize(("planted", "layers"), [(SAME_LAYER, {1}), (OTHER_LAYER, {1, 2})])
@pytest.mark.parametrize("slots", [(), SLOT_COLUMNS], ids=["heads alone", "beside slots"])
def test_exactly_the_layers_of_the_planted_heads_are_chosen(planted, layers, slots):
    exact = 0
    for seed in range(20):
        choice = found_layers(draw(seed, planted, slot_worth=SLOT_WORTH if len(slots) else None).sums, LAYERS, slots)
        assert set(choice.layers) >= layers
        assert choice.layers[0] == 1  # 1.0 and 0.6 against 0.8
        assert choice.layers == tuple(layer for layer, _, _ in choice.steps)
        assert all(choice.stability[layer] == 1 for layer in layers)
        exact += set(choice.layers) == layers
    assert exact >= 19


def test_pure_noise_selects_nothing_and_says_so():
    draws = [draw(seed, {}).sums for seed in range(60)]
    fits = [fit_heads(sums, range(HEADS)) for sums in draws]
    assert sum(fit.selected for fit in fits) <= 4  # 3% of many more draws; at one standard error 7%
    assert sum(bool(found_layers(sums, LAYERS).layers) for sums in draws) <= 3
    nothing = next(fit for fit in fits if not fit.selected)
    assert nothing.strength == 1 and nothing.explained == 0 and not nothing.weights.any()
    assert describe_heads(nothing).startswith("nothing: no head predicts the answers better than chance")


def test_noise_around_slots_that_matter_selects_no_head():
    draws = [draw(seed, {}, slot_worth=SLOT_WORTH).sums for seed in range(40)]
    assert sum(fit_heads(sums, range(HEADS), SLOT_COLUMNS).selected for sums in draws) <= 3
    assert sum(bool(found_layers(sums, LAYERS, SLOT_COLUMNS).layers) for sums in draws) <= 3


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


def test_a_layers_step_is_the_share_that_fits_on_the_rows_explain():
    data = draw(1, OTHER_LAYER)
    choice = found_layers(data.sums, LAYERS)
    layer, share, error = choice.steps[0]
    x = data.rows[:, LAYERS[layer]] / data.rows[:, LAYERS[layer]].std(0)
    saved = np.zeros(FOLDS)
    for fold in range(FOLDS):
        rows = data.fold != fold
        ridge = Ridge(alpha=0.01 * (x[rows] ** 2).sum(0).mean(), fit_intercept=False).fit(x[rows], data.y[rows])
        saved[fold] = (data.y[~rows] ** 2).sum() - ((data.y[~rows] - ridge.predict(x[~rows])) ** 2).sum()
    assert share == pytest.approx(saved.sum() / (data.y**2).sum(), rel=1e-9)
    squares = np.array([(data.y[data.fold == fold] ** 2).sum() for fold in range(FOLDS)])
    assert error == pytest.approx(np.std(saved - share * squares, ddof=1) * FOLDS**0.5 / squares.sum(), rel=1e-9)
    assert 0 < GATE * error < share


def test_a_layers_stability_is_how_often_the_others_choose_it_without_one_fold():
    seen = set()
    for seed in range(8):
        sums = draw(seed, {4: 1.0, 11: -0.4}, noise=8.0).sums
        arrays = (sums.gram, sums.moment, sums.squares, sums.rows)
        without = [FoldSums(*(np.delete(array, fold, 0) for array in arrays)) for fold in range(FOLDS)]
        found = [found_layers(each, LAYERS).layers for each in without]
        shares = found_layers(sums, LAYERS).stability
        assert shares == tuple(sum(layer in one for one in found) / FOLDS for layer in range(4))
        seen |= set(shares)
    assert len(seen) > 2  # some layer was neither always nor never chosen, or counting would not show


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


@pytest.mark.parametrize("factor", [1e-4, 1e4])
@pytest.mark.parametrize("column", [4, 7], ids=["planted", "not planted"])
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


def test_the_report_counts_heads_and_gives_the_interval():
    fit = fit_heads(draw(0, SAME_LAYER).sums, range(HEADS))
    fit = replace(fit, explained=0.0213, explained_error=0.0031)
    assert describe_heads(fit) == "3 of 16 heads, 2.1% of the variance ± 0.3%"
    assert fit.strength in STRENGTHS


def test_layers_that_explain_equally_much_within_a_tie_go_by_their_number() -> None:
    sums = draw(3, SAME_LAYER).sums  # layer 1; a copy of its heads stands first, weaker by less than a tie
    twice = [4, 5, 6, 7, *range(4, HEADS)]
    copied = sums.columns(twice)
    copied.moment[:, :4] *= 1 - 1e-7
    apart = found_layers(copied, LAYERS)
    assert apart.layers[0] == 1, "exactly, the copy explains less"
    assert found_layers(copied, LAYERS, (), Tolerance(1e-4)).layers[0] == 0
