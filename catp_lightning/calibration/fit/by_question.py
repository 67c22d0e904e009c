"""Ridge regression in which the weights of heads and slots change with the question, from sums alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from catp_lightning.calibration.fit.heads import GATE, gain, left_out_errors, prepare, training
from catp_lightning.calibration.fit.sums import FoldSums

PENALTIES = (0.3, 0.1, 0.03, 0.01)
"""Ridge penalties of the products with the question, as shares of a column's sum of squares; the strongest first."""

PLAIN = 0.01
"""The same penalty of heads and slots."""


@dataclass(frozen=True)
class QuestionFit:
    """Weights of F heads and slots, and how each changes with the C components of a question.

    Attributes:
        weights: float64 [F], weights for the mean question.
        changes: float64 [F, C], change of each weight for one unit of each component.
        explained: share of the answers' variance explained out of fold, beyond weights that do not change.
        explained_error: standard error of `explained` over folds.
        penalty: the penalty that was chosen.
    """

    weights: np.ndarray
    changes: np.ndarray
    explained: float
    explained_error: float
    penalty: float


def fit_by_question(sums: FoldSums, plain: Sequence[int], products: Sequence[int]) -> QuestionFit | None:
    """Fit weights that change with the question, if that explains more out of fold by over `GATE` standard errors.

    Args:
        sums: sums by fold; with fewer than two folds that have rows nothing is fitted.
        plain: columns of the F heads and slots.
        products: columns of their products with C components, all components of a column first.

    Returns:
        The fit with the penalty of the smallest out-of-fold error; None if the question explains too little.
    """
    if not products or (sums.rows > 0).sum() < 2:
        return None
    alone, together = (prepare(sums, [*plain, *more], [])[0] for more in ([], products))
    without = _errors(alone, len(plain), 0.0)
    errors = [_errors(together, len(plain), penalty) for penalty in PENALTIES]
    best = min(range(len(PENALTIES)), key=lambda number: errors[number].sum())
    squares = sums.squares[sums.rows > 0]
    share, error = gain(without - errors[best], squares)
    if share <= GATE * error:
        return None
    return refit_by_question(sums, plain, products, PENALTIES[best], (share, error))


def refit_by_question(
    sums: FoldSums, plain: Sequence[int], products: Sequence[int], penalty: float, explained: tuple[float, float]
) -> QuestionFit:
    """Fit the weights with a given penalty; arguments as in `fit_by_question`, and `explained` for the record."""
    data, scale = prepare(sums, [*plain, *products], [])
    weights = _solve(*training(data)[:2], len(plain), penalty) / scale
    changes = weights[len(plain) :].reshape(len(plain), -1)
    return QuestionFit(weights[: len(plain)], changes, *explained, penalty)


def _errors(data: FoldSums, plain: int, penalty: float) -> np.ndarray:
    """Return the squared error, by fold, of fits that have not seen it, from prepared sums: float64 [K]."""
    fits = [_solve(*training(data, fold)[:2], plain, penalty) for fold in range(len(data.rows))]
    return np.stack([left_out_errors(data, fold, weights) for fold, weights in enumerate(fits)])


def _solve(gram: np.ndarray, moment: np.ndarray, plain: int, penalty: float) -> np.ndarray:
    """Return the ridge solution: the first `plain` columns with the penalty `PLAIN`, all others with `penalty`."""
    shares = np.where(np.arange(len(moment)) < plain, PLAIN, penalty)
    mean = gram.diagonal().mean() or 1.0
    return np.asarray(np.linalg.solve(gram + np.diag(shares * mean), moment))
