"""Layers found from sums alone, on probes of a planted model."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from catp_lightning.calibration.fit.heads import GATE
from catp_lightning.calibration.fit.sums import FoldSums
from catp_lightning.calibration.fit.ties import Tolerance
from catp_lightning.calibration.settings import DEFAULTS
from tests.support.planted_heads import (
    HEADS,
    LAYERS,
    OTHER_LAYER,
    SAME_LAYER,
    SLOT_COLUMNS,
    SLOT_WORTH,
    draw,
    found_layers,
)

FOLDS = DEFAULTS.folds


@pytest.mark.slow
@pytest.mark.parametrize(("planted", "layers", "slots"), [(SAME_LAYER, {1}, ()), (OTHER_LAYER, {1, 2}, SLOT_COLUMNS)])
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


@pytest.mark.slow
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


def test_layers_that_explain_equally_much_within_a_tie_go_by_their_number() -> None:
    sums = draw(3, SAME_LAYER).sums  # layer 1; a copy of its heads stands first, weaker by less than a tie
    twice = [4, 5, 6, 7, *range(4, HEADS)]
    copied = sums.columns(twice)
    copied.moment[:, :4] *= 1 - 1e-7
    apart = found_layers(copied, LAYERS)
    assert apart.layers[0] == 1, "exactly, the copy explains less"
    assert found_layers(copied, LAYERS, (), Tolerance(1e-4)).layers[0] == 0
