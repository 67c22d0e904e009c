"""Signed sparse regression of a kept token's effect on the answer on head scores, from sums alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from catp_lightning.calibration.fit.sums import FoldSums
from catp_lightning.utils.messages import without_warnings

RIDGE = 0.01
"""Ridge penalty of every least-squares fit, as a share of the mean diagonal of its block of the Gram matrix."""

STRENGTHS = np.geomspace(1, 1e-3, 40)
"""Penalties of the lasso path, as shares of the smallest penalty that selects nothing."""

GATE = 2.0
"""Number of standard errors by which an out-of-fold gain must exceed 0.

Of 300 draws of pure noise (120 samples of 16 probes), 3% selected one of 16 heads, and 2% one of 4 layers. With one
standard error 7% and 8% did, and 31% with 24 layers: five folds estimate it roughly, and the best of many is taken.
With three 1% did, but weak heads that calibration would gain from are missed; a head that is wrongly selected still has
to win among the candidates."""

TOLERANCE = 0.8
"""Loss, in standard errors, that is accepted for fewer heads.

Below 1: if a single fold loses a head, the loss equals its own standard error, and a strength would be chosen at which
the selection of heads that matter varies with the fold."""


@dataclass(frozen=True)
class HeadFit:
    """Signed weights of H heads, and values of S slots.

    Attributes:
        weights: float64 [H], value of one unit of each head's score; exactly 0 for a head that is not selected.
        slots: float64 [S], value of each slot, fitted together with the heads; empty without slots.
        explained: share of the answers' variance explained out of fold, beyond the slots. The strength was chosen on
            the same folds, so it is a little optimistic if many strengths are about equal.
        explained_error: standard error of `explained` over folds.
        strength: lasso penalty, as a share of the smallest that selects nothing; 1.0: nothing selected.
        stability: float64 [H], share of leave-one-fold-out fits that select the head at this strength with the same
            sign; 0 for a head that is not selected.
    """

    weights: np.ndarray
    slots: np.ndarray
    explained: float
    explained_error: float
    strength: float
    stability: np.ndarray

    @property
    def selected(self) -> bool:
        """True if any head was selected."""
        return bool(self.weights.any())


def fit_heads(sums: FoldSums, heads: Sequence[int], slots: Sequence[int] = ()) -> HeadFit:
    """Select heads by a lasso path at a cross-validated strength, and fit their weights by least squares.

    Heads compete in units of their own spread. Slots are not selected: they are always in, with a small ridge. At every
    strength the lasso's heads are fitted again without its shrinkage, and cross-validation compares these refits: by
    the lasso's own errors the best strength selects noise too (three planted heads of 16 were found exactly in 35% of
    draws, by refits in 95%), since only a weak penalty undoes the shrinkage of the true heads. The strongest penalty
    whose error is within `TOLERANCE` of the smallest is chosen, if it gains more than `GATE` standard errors.

    Args:
        sums: sums by fold; folds without rows are left out, and with fewer than two folds nothing is selected.
        heads: columns of the H heads.
        slots: columns of the S slots.
    """
    data, scale = prepare(sums, heads, slots)
    number, folds = len(slots), len(data.rows)
    gram, moment, rows = training(data)
    top = np.abs(partial_out(gram, moment, number)[1]).max(initial=0) / max(rows, 1)
    if folds < 2 or top == 0:
        return _fit(refit(gram, moment, number), scale, 1.0, (0.0, 0.0), np.zeros(len(heads)))

    fits = np.stack([_path(*training(data, fold), number, top) for fold in range(folds)])  # [K, A, S + H]
    errors = np.stack([left_out_errors(data, fold, fits[fold]) for fold in range(folds)])  # [K, A]
    chosen = _strength(errors, data.squares)
    weights = _path(gram, moment, rows, number, top)[chosen]
    same = np.sign(fits[:, chosen, number:]) == np.sign(weights[number:])
    stability = np.where(weights[number:] != 0, same.mean(0), 0.0)
    explained = gain(errors[:, 0] - errors[:, chosen], data.squares)
    return _fit(weights, scale, float(STRENGTHS[chosen]), explained, stability)


def prepare(sums: FoldSums, heads: Sequence[int], slots: Sequence[int]) -> tuple[FoldSums, np.ndarray]:
    """Return the sums of the folds that have rows, and the spread of each head: float64 [H].

    Columns are the slots, then the heads in units of their spread.
    """
    filled = sums.rows > 0
    arrays = (sums.gram[filled], sums.moment[filled], sums.squares[filled], sums.rows[filled])
    data = FoldSums(*arrays).columns([*slots, *heads])
    variance = np.einsum("kff->f", data.gram)[len(slots) :] / max(data.rows.sum(), 1)
    constant = variance <= 1e-20 * variance.max(initial=0)  # a constant after centring: rounding, not a score
    scale = np.sqrt(np.where(constant, np.inf, variance))  # dividing by infinity makes it exactly 0
    units = np.concatenate([np.ones(len(slots)), scale])
    return replace(data, gram=data.gram / units / units[:, None], moment=data.moment / units), scale


def training(sums: FoldSums, without: int | None = None) -> tuple[np.ndarray, np.ndarray, int]:
    """Return Gram matrix [F, F], moments [F] and number of rows, summed over all folds except `without`."""
    others = np.arange(len(sums.rows)) != without
    return sums.gram[others].sum(0), sums.moment[others].sum(0), int(sums.rows[others].sum())


def partial_out(gram: np.ndarray, moment: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Return Gram matrix and moments of the heads with the slots partialled out (Frisch-Waugh)."""
    ridge = np.diag(_ridge(np.diagonal(gram)[:slots]))
    explained = np.linalg.solve(gram[:slots, :slots] + ridge, np.c_[gram[:slots, slots:], moment[:slots]])
    cross = gram[slots:, :slots]
    return gram[slots:, slots:] - cross @ explained[:, :-1], moment[slots:] - cross @ explained[:, -1]


def refit(gram: np.ndarray, moment: np.ndarray, slots: int, heads: Sequence[int] | np.ndarray = ()) -> np.ndarray:
    """Fit slots and `heads` (indices from 0 to H - 1) by least squares with a small ridge: float64 [S + H]."""
    used = np.concatenate([np.arange(slots), slots + np.asarray(heads, dtype=int)])
    block, diagonal = gram[np.ix_(used, used)], np.diagonal(gram)[used]
    ridge = np.concatenate([_ridge(diagonal[:slots]), _ridge(diagonal[slots:])])
    weights = np.zeros(len(moment))
    weights[used] = np.linalg.solve(block + np.diag(ridge), moment[used])
    return weights


def left_out_errors(sums: FoldSums, fold: int, weights: np.ndarray) -> np.ndarray:
    """Return the squared error on one fold of fits that have not seen it: float64 [..., F] -> [...]."""
    return sums.squares[fold] - 2 * weights @ sums.moment[fold] + (weights @ sums.gram[fold] * weights).sum(-1)


def gain(saved: np.ndarray, squares: np.ndarray) -> tuple[float, float]:
    """Return the squared error saved in K folds, as a share of the variance, with standard error: float64 [K], [K]."""
    share = saved.sum() / squares.sum()
    spread = saved - share * squares  # folds differ in size: a large one saves more
    return float(share), float(np.sqrt(len(saved) * spread.var(ddof=1)) / squares.sum())


def rounded(values: np.ndarray) -> list[float]:
    """Round to six significant digits, so that sums added in another order give the same value or its neighbour.

    Other batches and processes add in another order. With fewer digits, neighbours would be too far apart: with four,
    by up to a thousandth.
    """
    return [float(f"{value:.6g}") for value in values]


def _strength(errors: np.ndarray, squares: np.ndarray) -> int:
    """Return the index in `STRENGTHS` of the chosen penalty; 0: nothing is selected."""
    best = errors[:, errors.sum(0).argmin()]
    lost = [gain(errors[:, index] - best, squares) for index in range(errors.shape[1])]
    chosen = next(index for index, (share, error) in enumerate(lost) if share <= TOLERANCE * error)
    share, error = gain(errors[:, 0] - errors[:, chosen], squares)
    return chosen if share > GATE * error else 0


def _path(gram: np.ndarray, moment: np.ndarray, rows: int, slots: int, top: float) -> np.ndarray:
    """Return the refits at each of the A strengths, the first without heads: float64 [A, S + H]."""
    from sklearn.exceptions import ConvergenceWarning  # here: importing it changes the environment of the process
    from sklearn.linear_model import lars_path_gram

    inner, outer = partial_out(gram, moment, slots)
    with without_warnings(category=ConvergenceWarning):  # it warns of duplicate columns, and takes one
        penalties, _, path = lars_path_gram(  # in units of `top`: penalties are strengths
            outer / (rows * top),
            inner / rows,
            n_samples=1,
            max_iter=8 * len(outer),
            alpha_min=STRENGTHS[-1],
            method="lasso",
        )
    path = np.stack([np.interp(STRENGTHS, penalties[::-1], weights[::-1]) for weights in path], axis=1)  # [A, H]
    path[0] = 0
    return np.stack([refit(gram, moment, slots, np.flatnonzero(weights)) for weights in path])


def _ridge(diagonal: np.ndarray) -> np.ndarray:
    """Return ridge penalties for a block of the Gram matrix; never 0, so that columns without variance are solvable."""
    return np.full(len(diagonal), RIDGE * diagonal.sum() / max(len(diagonal), 1) or 1.0)


def _fit(
    weights: np.ndarray, scale: np.ndarray, strength: float, explained: tuple[float, float], stability: np.ndarray
) -> HeadFit:
    slots = len(weights) - len(scale)
    return HeadFit(weights[slots:] / scale, weights[:slots], *explained, strength, stability)
