"""Compare a chosen policy with the best control, and warn if its evidence is too thin to rely on."""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.stats import norm

from catp_lightning.calibration.report.evidence import RetentionPoint, amount, evidence_of, unit
from catp_lightning.policy import PruningPolicy

ENOUGH = 64
"""Number of checked answers below which a policy gets a warning: at 90% agreement its interval is 15 points wide."""


def paired_difference(
    questions: np.ndarray, ours: np.ndarray, theirs: np.ndarray, confidence: float = 0.95
) -> tuple[float, tuple[float, float]]:
    """Return the difference of two shares measured on the same questions, with a confidence interval over images.

    This is the adjusted Wald interval for paired shares of Agresti and Min (2005, doi:10.1002/sim.1781), which adds
    half an observation to each of the four cells, with images as clusters: answers to questions about one image are
    correlated.

    Args:
        questions: int [I], number of questions asked about each of I images.
        ours: int [I], number of them to which the first policy gave the unpruned answer.
        theirs: int [I], number of them to which the second policy gave the unpruned answer.
        confidence: confidence of the interval, in (0, 1).

    Returns:
        The difference, first minus second, in [-1, 1], and the ends of its interval.

    >>> asked = np.ones(100, dtype=int)
    >>> difference, (low, high) = paired_difference(asked, asked, np.arange(100) >= 10)
    >>> round(difference, 3), round(low, 3), round(high, 3)
    (0.1, 0.037, 0.159)
    """
    count = int(questions.sum())
    gained = ours.astype(float) - theirs.astype(float)
    adjusted = gained.sum() / (count + 2)
    variance = (((gained - adjusted * questions) ** 2).sum() + 1) / (count + 2) ** 2
    reach = norm.ppf(0.5 + confidence / 2) * variance**0.5
    return float(gained.sum() / count), (max(-1.0, float(adjusted - reach)), min(1.0, float(adjusted + reach)))


def verdict(interval: Sequence[float]) -> str:
    """Classify the interval of a difference: "ahead" if it is above 0, "behind" if below, "level" if it contains 0.

    >>> verdict((0.01, 0.05)), verdict((-0.01, 0.05)), verdict((-0.05, -0.01))
    ('ahead', 'level', 'behind')
    """
    low, high = interval
    return "ahead" if low > 0 else "behind" if high < 0 else "level"


def against(point: RetentionPoint) -> str:
    """Describe in words how a budget's choice compares with its best control; "" if no control was checked."""
    best = point["best_control"]
    if best is None:
        return ""
    low, high = best["interval"]
    said = {"ahead": "ahead of", "level": "level with", "behind": "behind"}[best["verdict"]]
    return f"{said} {best['name']} ({best['difference']:+.1%}, {low:+.1%} to {high:+.1%})"


def doubts(policies: Sequence[PruningPolicy]) -> Iterator[str]:
    """Yield a sentence for each reason to doubt policies: few checked answers, a better control, low agreement."""
    evidence, paid = evidence_of(policies[0]), unit(policies[0])
    checked = evidence["samples"]["check"]
    kept = {repr(amount(policy)) for policy in policies}
    points = [point for point in evidence["retention"] if repr(point["keep"]) in kept]
    if points and checked < ENOUGH:
        said = "; ".join(
            f"{point['agreement']:.0%} at {paid} {point['keep']} may be {point['interval'][0]:.0%} to "
            f"{point['interval'][1]:.0%}"
            for point in points
        )
        yield (
            f"Calibration evidence is thin: agreement was checked on {checked} answers, fewer than {ENOUGH} ({said}). "
            f"Calibrate on {-(-ENOUGH // max(1, checked))} times as many questions or more before you rest on it."
        )
    for point in points:
        best = point["best_control"]
        if best is not None and best["difference"] < 0:
            behind, chosen, control = best["verdict"] == "behind", point["chosen"], best["name"]
            yield (
                f"Calibration evidence at {paid} {point['keep']}: the chosen policy ({chosen}) is behind the control "
                f"{control} on the {checked} checked answers, by {-best['difference']:.1%} (95% interval of the "
                f"difference {best['interval'][0]:+.1%} to {best['interval'][1]:+.1%}). "
                + (
                    "Use that control instead, or calibrate on more data."
                    if behind
                    else "The interval contains 0: they are level, and more data would tell them apart."
                )
            )
        if point["agreement"] < 0.5:
            yield (
                f"Calibration evidence at {paid} {point['keep']}: only {point['agreement']:.0%} of the checked answers "
                "are the unpruned model's. Take a larger budget."
            )
