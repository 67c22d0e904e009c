"""Routes: which candidate's answers diverge least is predicted from the question."""

import numpy as np

from catp_lightning.calibration.search.choice import paired
from catp_lightning.calibration.search.sums import Rows

RIDGE = 20.0
"""Ridge penalty of a divergence's regression on the question, in samples."""

GATE = 2.0
"""Standard errors by which a route must lower the divergence out of fold."""

TIE = 1e-6
"""Gains, in nats, that differ by less are equal: the first candidate is taken, in whatever order batches were added."""

ROUTES = 4
"""Most candidates that questions are routed between."""

COMPLEMENTS = 8
"""Candidates that go on to the next round because they are best for some questions, at most."""


def complements(rows: Rows, first: int) -> list[int]:
    """Return candidates that are best for some of the questions, `first` leading: the next one gains most each time."""
    predicted = _design(rows) @ weights(rows)
    return _grow(predicted, rows, first, COMPLEMENTS, 0.0)[0]


def routes(rows: Rows, folds: np.ndarray, first: int) -> tuple[list[int], np.ndarray]:
    """Return candidates to route questions between, and which of them each sample takes, predicted out of fold.

    Args:
        rows: answers of A candidates to N samples.
        folds: int64 [N], fold of each sample.
        first: the candidate that all questions take if no route gains more than `GATE` standard errors.

    Returns:
        Indices of the candidates, `first` leading, and for each sample the index of the one it takes, int64 [N].
    """
    predicted = np.empty_like(rows.divergence)
    for fold in np.unique(folds):
        here = folds == fold
        predicted[here] = _design(rows)[here] @ weights(rows, ~here)
    return _grow(predicted, rows, first, ROUTES, GATE)


def weights(rows: Rows, here: np.ndarray | None = None) -> np.ndarray:
    """Fit each candidate's expected divergence by ridge regression on components and a constant: float64 [C + 1, A].

    Args:
        rows: answers of A candidates to N samples.
        here: bool [N], samples to fit on; None: all.
    """
    design, target = _design(rows), rows.divergence
    if here is not None:
        design, target = design[here], target[here]
    penalty = np.full(design.shape[1], RIDGE)
    penalty[-1] = 1e-6  # the mean is not shrunk
    return np.asarray(np.linalg.solve(design.T @ design + np.diag(penalty), design.T @ target))


def _design(rows: Rows) -> np.ndarray:
    return np.c_[rows.questions, np.ones(len(rows.questions))]


def _grow(predicted: np.ndarray, rows: Rows, first: int, most: int, gate: float) -> tuple[list[int], np.ndarray]:
    """Add the candidate that lowers the mean divergence most, while it does by more than `gate` standard errors."""
    samples = np.arange(len(predicted))
    chosen, taken = [first], np.full(len(predicted), first)
    while len(chosen) < most:
        now, best = rows.divergence[samples, taken], None
        for number in range(predicted.shape[1]):
            if number not in chosen:
                trial = np.array([*chosen, number])[predicted[:, [*chosen, number]].argmin(1)]
                gained = now - rows.divergence[samples, trial]
                if best is None or gained.mean() > best[0].mean() + TIE:
                    best = gained, number, trial
        if best is None:
            break
        lead, error = paired(best[0], rows.images)
        if lead <= gate * error or lead <= TIE:
            break
        chosen, taken = [*chosen, best[1]], best[2]
    return chosen, taken
