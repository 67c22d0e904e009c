"""Upper bound of the share of questions that disagree, where several are asked about one image.

Answers to questions about one image are correlated, so images are the independent draws: image i has n questions, of
which d disagree. The bound is for E[d] / E[n], the share of questions of new images; it holds for any correlation and
for images whose number of questions goes with their difficulty. It assumes images that are independent draws, and a
number N that no image has more questions than, fixed without the answers. Two tests share the risk, half of it each,
and the smaller bound counts:

- *One question of an image*, of images that are taken with probability n / N: it disagrees with probability
  E[d] / E[n], exactly, so that the binomial bound holds. Nothing does better where an image's answers fall together.
- *All questions*, by betting (2010.09686): under a share a, each factor 1 + s (a n - d) / ((1 - a) N) has mean 1 for a
  stake s in [0, 1], and so has their product; that it exceeds 1 / risk has a probability of at most the risk (Markov).
  The mean over a few stakes does too. It does not depend on the order of the images. It gains where an image's
  answers are nearly independent: one disagreement among many answers then costs little.

With one question about each image both would ask the same, and the binomial bound takes the whole risk.
"""

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp

from catp_lightning.calibration.search.promise import upper_bound

STAKES = (1.0, 0.75)
"""Stakes of the bets: all, which nothing beats where hardly a question disagrees, and less, for where some do."""


def cluster_bound(
    questions: np.ndarray, disagreed: np.ndarray, drawn: np.ndarray, place: np.ndarray, most: int, confidence: float
) -> float:
    """Return the one-sided upper bound of the share of questions that disagrees, in (0, 1].

    Args:
        questions: int64 [I], number of questions about each image, 1 to `most`.
        disagreed: int64 [I], number of them that disagree.
        drawn: int64 [I], 1 where the one question drawn at random among them disagrees, otherwise 0.
        place: float [I], numbers in [0, 1) drawn uniformly and independently of the answers.
        most: limit on the number of questions about an image, of new images too.
        confidence: confidence of the bound, in (0, 1).

    >>> ones, places = np.ones(149, dtype=int), np.zeros(149)
    >>> round(cluster_bound(ones, 0 * ones, 0 * ones, places, 1, 0.95), 4)  # that of the binomial
    0.0199
    >>> round(cluster_bound(4 * ones, 0 * ones, 0 * ones, places, 4, 0.95), 4)  # two tests: half the risk each
    0.0245
    """
    if not len(questions):
        return 1.0
    taken = place * most < questions
    if most == 1:
        return upper_bound(int(drawn.sum()), len(questions), confidence)
    half = (1 + confidence) / 2
    one = upper_bound(int(drawn[taken].sum()), int(taken.sum()), half) if taken.any() else 1.0
    return min(one, betting_bound(questions, disagreed, most, half))


def betting_bound(questions: np.ndarray, disagreed: np.ndarray, most: int, confidence: float) -> float:
    """Return the bound by betting on all questions; arguments as those of `cluster_bound`."""
    pairs, count = np.unique(np.stack([questions, disagreed]), axis=1, return_counts=True)
    asked, differ = pairs[:, :, None] / most
    stakes = np.array(STAKES)

    def excess(share: float) -> float:  # rises with the share
        with np.errstate(divide="ignore"):  # a stake of all is lost by an image on which every answer differs
            wealth = count @ np.log1p(stakes * np.maximum((share * asked - differ) / (1 - share), -1))
        return float(max(-700, logsumexp(wealth) - np.log(len(stakes))) + np.log1p(-confidence))

    highest = 1 - 1e-9
    return float(brentq(excess, 0, highest, xtol=1e-13)) if excess(highest) > 0 else 1.0
