"""Confidence intervals."""

from scipy.stats import binomtest


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of the share `successes` / `total`: lower and upper bound, in [0, 1].

    Raises:
        ValueError: `total` is below 1, `successes` outside 0 .. total, or `confidence` outside [0, 1].

    >>> low, high = wilson_interval(90, 100)
    >>> round(low, 3), round(high, 3)
    (0.826, 0.945)
    """
    interval = binomtest(successes, total).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)
