"""Choice between candidates: the least divergence, and in close calls a plain rule before a fitted one."""

from collections.abc import Sequence

import numpy as np

from catp_lightning.calibration.fit.ties import Tolerance
from catp_lightning.calibration.search.candidate import Candidate

NOTHING = 0.01
"""Floor, in nats, of the scale on which divergences are compared: below it relative differences are rounding noise."""

LEVEL = 1.0
"""Paired standard errors within which two candidates are level."""

REVERSED = 2.0
"""Paired standard errors by which a rule that prefers low scores must be ahead of every other rule."""


def choose(candidates: Sequence[Candidate], divergence: np.ndarray, images: np.ndarray, ties: Tolerance) -> int:
    """Return the index of the candidate to choose.

    A fitted rule that is ahead by chance does no better on new samples, and may do much worse on other images. So of
    all candidates that are at most one standard error behind the best, rules as published and diversity alone go before
    those with a chosen setting, and these before fitted ones; among equals the best is chosen. A rule that prefers
    tokens with low scores is chosen only if it is ahead of all others by two standard errors.

    Args:
        candidates: A candidates, of which the first of equal ones wins.
        divergence: float64 [N, A], divergence of each candidate on each sample, in nats.
        images: int64 [N], image of each sample.
        ties: divergences that differ by less are equal.
    """
    means = divergence.mean(0)
    everyone = ties.order(means.tolist(), NOTHING)  # best first
    best = everyone[0]
    plain = [number for number in everyone if not candidates[number].reversed]
    if plain:
        lead, error = paired(divergence[:, plain[0]] - divergence[:, best], images)
        if not candidates[best].reversed or lead <= REVERSED * error:
            everyone, best = plain, plain[0]
    tie, level = ties.relative * max(means[best], NOTHING), []
    for number in everyone:
        behind, error = paired(divergence[:, number] - divergence[:, best], images)
        if behind <= max(LEVEL * error, tie):
            level.append(number)
    return min(level, key=lambda n: (candidates[n].fitted, everyone.index(n)))


def paired(differences: np.ndarray, images: np.ndarray) -> tuple[float, float]:
    """Return the mean of N differences and its standard error, with images as clusters: questions about one correlate.

    >>> mean, error = paired(np.array([1.0, 1.0, 3.0, 3.0]), np.array([7, 7, 8, 8]))
    >>> mean, round(error, 3)
    (2.0, 1.0)
    """
    mean = float(differences.mean())
    _, place = np.unique(images, return_inverse=True)
    sums = np.bincount(place, differences - mean)
    count = len(sums)
    return mean, float(np.sqrt((sums**2).sum() * count / max(1, count - 1)) / len(differences))
