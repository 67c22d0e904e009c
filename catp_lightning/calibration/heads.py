"""Which heads' votes tell what a kept token does for the answer, and how much: a signed sparse fit from sums alone."""

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from catp_lightning.calibration.statistics import FoldSums

RIDGE = 0.01
"""Penalty of every least-squares fit, as a share of the mean diagonal of its block of the Gram matrix."""

STRENGTHS = np.geomspace(1, 1e-3, 40)
"""Penalties of the path, as shares of the smallest that selects nothing."""

GATE = 2.0
"""Standard errors by which an out-of-fold gain must exceed 0. Of 300 draws of pure noise (120 samples of 16 probes), 3%
selected one of 16 heads, and 2% one of 4 layers. One standard error let 7% and 8% through, and 31% where there are 24
layers: five folds estimate it roughly, and the best of many is taken. Three let 1% through, but miss weak heads that
calibration would gain from; what is wrongly selected still has to win among the candidates."""

TOLERANCE = 0.8
"""Standard errors given away for fewer heads. Below 1: where one fold alone loses a head, the loss equals its own
standard error, and a strength would be taken at which heads that matter come and go with the fold."""


@dataclass(frozen=True)
class HeadFit:
    """Signed weights of heads.

    Attributes:
        weights: float64 [H], what one standardised vote of each head is worth; exactly 0 where not selected.
        slots: float64 [S], what each slot is worth beside the heads; empty without slots.
        explained: share of the answers' variance explained out of fold, beyond the slots. The strength was chosen on
            the same folds: a little optimistic where many strengths are about equal.
        explained_error: its standard error over folds.
        strength: the penalty, as a share of the smallest that selects nothing; 1.0: nothing selected.
        stability: float64 [H], share of folds without which the head is found at this strength with the same sign;
            0 where not selected.
    """

    weights: np.ndarray
    slots: np.ndarray
    explained: float
    explained_error: float
    strength: float
    stability: np.ndarray

    @property
    def selected(self) -> bool:
        """Whether any head was."""
        return bool(self.weights.any())


def fit_heads(sums: FoldSums, heads: Sequence[int], slots: Sequence[int] = ()) -> HeadFit:
    """A lasso path says which heads, at a strength found by cross-validation; least squares says what each is worth.

    Heads compete in units of their own spread. Slots are not selected: they are always in, with a small ridge. At every
    strength the lasso's heads are fitted again without its shrinkage, and this refit is what cross-validation compares:
    by the lasso's own errors the best strength drags in noise (three planted heads of 16 were found exactly in 35% of
    draws, by refits in 95%), since only a weak penalty undoes the shrinkage of the true heads. Taken is the strongest
    penalty whose error is within `TOLERANCE` of the smallest, if it gains more than `GATE` standard errors.

    Args:
        sums: by fold; folds without rows are left out, and below two folds nothing is selected.
        heads: columns of the heads, H.
        slots: columns of the slots, S.
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


def describe_heads(fit: HeadFit) -> str:
    """One line for a report.

    >>> nothing = np.zeros(16)
    >>> describe_heads(HeadFit(nothing, np.zeros(0), 0.0, 0.0, 1.0, nothing))
    'nothing: no head predicts the answers better than chance on left-out images'
    """
    if not fit.selected:
        return "nothing: no head predicts the answers better than chance on left-out images"
    found = f"{np.count_nonzero(fit.weights)} of {len(fit.weights)} heads"
    return f"{found}, {fit.explained:.1%} of the variance ± {fit.explained_error:.1%}"


def prepare(sums: FoldSums, heads: Sequence[int], slots: Sequence[int]) -> tuple[FoldSums, np.ndarray]:
    """The folds that have rows; slots first, then heads in units of their spread, and those units: float64 [H]."""
    filled = sums.rows > 0
    arrays = (sums.gram[filled], sums.moment[filled], sums.squares[filled], sums.rows[filled])
    data = FoldSums(*arrays).columns([*slots, *heads])
    variance = np.einsum("kff->f", data.gram)[len(slots) :] / max(data.rows.sum(), 1)
    constant = variance <= 1e-20 * variance.max(initial=0)  # what centring leaves of a constant is rounding, not a vote
    scale = np.sqrt(np.where(constant, np.inf, variance))  # dividing by infinity makes it exactly 0
    units = np.concatenate([np.ones(len(slots)), scale])
    return replace(data, gram=data.gram / units / units[:, None], moment=data.moment / units), scale


def training(sums: FoldSums, without: int | None = None) -> tuple[np.ndarray, np.ndarray, int]:
    """Gram matrix [F, F], moments [F] and number of rows of all folds but one."""
    others = np.arange(len(sums.rows)) != without
    return sums.gram[others].sum(0), sums.moment[others].sum(0), int(sums.rows[others].sum())


def partial_out(gram: np.ndarray, moment: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Gram matrix and moments of the heads once the slots have explained what they can (Frisch-Waugh)."""
    ridge = np.diag(_ridge(np.diagonal(gram)[:slots]))
    explained = np.linalg.solve(gram[:slots, :slots] + ridge, np.c_[gram[:slots, slots:], moment[:slots]])
    cross = gram[slots:, :slots]
    return gram[slots:, slots:] - cross @ explained[:, :-1], moment[slots:] - cross @ explained[:, -1]


def refit(gram: np.ndarray, moment: np.ndarray, slots: int, heads: Sequence[int] | np.ndarray = ()) -> np.ndarray:
    """Least squares with a small ridge on the slots and some of the heads, 0 to H - 1: float64 [S + H]."""
    used = np.concatenate([np.arange(slots), slots + np.asarray(heads, dtype=int)])
    block, diagonal = gram[np.ix_(used, used)], np.diagonal(gram)[used]
    ridge = np.concatenate([_ridge(diagonal[:slots]), _ridge(diagonal[slots:])])
    weights = np.zeros(len(moment))
    weights[used] = np.linalg.solve(block + np.diag(ridge), moment[used])
    return weights


def left_out_errors(sums: FoldSums, fold: int, weights: np.ndarray) -> np.ndarray:
    """Squared error on one fold of fits that have not seen it: float64 [..., F] -> [...]."""
    return sums.squares[fold] - 2 * weights @ sums.moment[fold] + (weights @ sums.gram[fold] * weights).sum(-1)


def gain(saved: np.ndarray, squares: np.ndarray) -> tuple[float, float]:
    """Squared error saved in each fold, as a share of the variance, and its standard error: float64 [K], [K]."""
    share = saved.sum() / squares.sum()
    spread = saved - share * squares  # folds differ in size: a large one saves more
    return float(share), float(np.sqrt(len(saved) * spread.var(ddof=1)) / squares.sum())


def _strength(errors: np.ndarray, squares: np.ndarray) -> int:
    """Index of the chosen strength; 0: none."""
    best = errors[:, errors.sum(0).argmin()]
    lost = [gain(errors[:, index] - best, squares) for index in range(errors.shape[1])]
    chosen = next(index for index, (share, error) in enumerate(lost) if share <= TOLERANCE * error)
    share, error = gain(errors[:, 0] - errors[:, chosen], squares)
    return chosen if share > GATE * error else 0


_FILTERS = threading.Lock()
"""Warning filters are the process's: two threads that change and restore them by turns would leave the changed ones."""


def _path(gram: np.ndarray, moment: np.ndarray, rows: int, slots: int, top: float) -> np.ndarray:
    """Fits at every strength, the first without heads: float64 [A, S + H]."""
    from sklearn.exceptions import ConvergenceWarning  # here: importing it changes the environment of the process
    from sklearn.linear_model import lars_path_gram

    inner, outer = partial_out(gram, moment, slots)
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of columns that repeat others it takes one, and says so
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
    """Penalties of a block; never 0, or columns without any variance could not be solved."""
    return np.full(len(diagonal), RIDGE * diagonal.sum() / max(len(diagonal), 1) or 1.0)


def _fit(
    weights: np.ndarray, scale: np.ndarray, strength: float, explained: tuple[float, float], stability: np.ndarray
) -> HeadFit:
    slots = len(weights) - len(scale)
    return HeadFit(weights[slots:] / scale, weights[:slots], *explained, strength, stability)
