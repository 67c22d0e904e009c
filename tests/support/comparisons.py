"""A comparison of methods with made figures."""

import numpy as np

from catp_lightning.evaluation.comparison import Comparison, Result

IMAGES = [1, 1, 2, 3, 3, 3, 4, 5]


def comparison() -> Comparison:
    rng = np.random.default_rng(0)
    draw = lambda: rng.integers(0, 2, len(IMAGES)).astype(float)  # noqa: E731
    full = Result("no pruning", None, draw(), np.ones(len(IMAGES)), 32.0)
    rival = [
        Result("random", keep, draw(), draw(), tokens) for keep, tokens in ((0.5, 16.0), (4, 4.0)) for _ in range(3)
    ]
    ours = [Result("ours", keep, draw(), draw(), tokens) for keep, tokens in ((0.5, 16.0), (4, 4.0))]
    return Comparison(IMAGES, "ours", [full, *rival, *ours])
