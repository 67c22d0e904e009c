"""Select layers whose head scores predict a kept token's effect on the answer: forward selection, out-of-fold error."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from catp_lightning.calibration.fit.heads import GATE, gain, left_out_errors, prepare, refit, training
from catp_lightning.calibration.fit.sums import FoldSums
from catp_lightning.calibration.fit.ties import Tolerance

LayerStep = tuple[int, float, float]


@dataclass(frozen=True)
class LayerChoice:
    """Layers that were selected for a scorer.

    Attributes:
        layers: selected layers in the order they were added; empty: none predicts the answers better than chance.
        steps: for each addition the layer, the share of the answers' variance that it explains out of fold beyond the
            slots and the layers before it, and the standard error of that share.
        stability: for every layer, share of the leave-one-fold-out forward selections that select it. With two folds
            it is 0: one fold alone has nothing to check a choice on.
    """

    layers: tuple[int, ...]
    steps: tuple[LayerStep, ...]
    stability: tuple[float, ...]


def choose_layers(
    sums: FoldSums, layers: Sequence[Sequence[int]], slots: Sequence[int], ties: Tolerance
) -> LayerChoice:
    """Add the layer that lowers the out-of-fold error most, as long as that gain is above `GATE` standard errors.

    Args:
        sums: sums by fold; folds without rows are left out, and with fewer than two folds nothing is chosen.
        layers: columns of the heads of each layer.
        slots: columns of the slots, which are in every fit.
        ties: tolerance, as a share of the answers' variance, within which errors are equal and the lower layer wins.
    """
    data, _ = prepare(sums, [head for heads in layers for head in heads], slots)
    ends = np.cumsum([len(heads) for heads in layers])
    groups = np.split(np.arange(ends[-1] if len(ends) else 0), ends[:-1])  # heads of each layer, as `prepare` orders
    folds = np.arange(len(data.rows))
    steps = _forward(data, groups, len(slots), ties)
    found = [{step[0] for step in _forward(_some(data, folds != fold), groups, len(slots), ties)} for fold in folds]
    stability = tuple(sum(layer in one for one in found) / max(len(found), 1) for layer in range(len(layers)))
    return LayerChoice(tuple(step[0] for step in steps), steps, stability)


def _forward(data: FoldSums, groups: Sequence[np.ndarray], slots: int, ties: Tolerance) -> tuple[LayerStep, ...]:
    if len(data.rows) < 2 or not data.squares.any():
        return ()
    steps: list[LayerStep] = []
    chosen: list[int] = []
    error = _errors(data, groups, slots, chosen)
    while rest := [layer for layer in range(len(groups)) if layer not in chosen]:
        trials = {layer: _errors(data, groups, slots, [*chosen, layer]) for layer in rest}
        scale = float(data.squares.sum())
        best = rest[ties.order([float(trials[layer].sum()) for layer in rest], scale)[0]]
        share, spread = gain(error - trials[best], data.squares)
        if share <= GATE * spread:
            break
        error = trials[best]
        chosen.append(best)
        steps.append((best, share, spread))
    return tuple(steps)


def _errors(data: FoldSums, groups: Sequence[np.ndarray], slots: int, chosen: Sequence[int]) -> np.ndarray:
    """Return the out-of-fold squared error, by fold, of a fit on the slots and the chosen layers: float64 [K]."""
    heads = np.concatenate([np.arange(0), *(groups[layer] for layer in chosen)])
    fits = [refit(*training(data, fold)[:2], slots, heads) for fold in range(len(data.rows))]
    return np.stack([left_out_errors(data, fold, weights) for fold, weights in enumerate(fits)])


def _some(data: FoldSums, folds: np.ndarray) -> FoldSums:
    return FoldSums(data.gram[folds], data.moment[folds], data.squares[folds], data.rows[folds])
