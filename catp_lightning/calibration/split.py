"""Split samples into parts, folds and rounds by image, never by order: batches and processes do not matter."""

from collections.abc import Sequence

import torch
from torch import Tensor

from catp_lightning.utils.hashing import mix

PARTS = ("learn", "check")
"""Parts of a calibration split: everything is fitted and chosen on the first; the second only checks."""

CHECKED = 0.2
PROMISED = 0.5
"""Share of the images in the checking part if there is a promise; `CHECKED` without one.

A promise is tested by counting, and needs many images on which nothing was decided."""

FOLDS = 5
FIRST_ROUND = 32  # samples in the first round at least; with fewer, good candidates would be eliminated by chance


def part_of(images: Tensor, checked: float = CHECKED) -> Tensor:
    """Return the part of each image as an index into `PARTS`: int64 [I] -> int64 [I]. All its questions are in it."""
    return (_place(images) >= 1 - checked).long()


def fold_of(images: Tensor) -> Tensor:
    """Return the fold of each image, drawn independently of its part: int64 [I] -> int64 [I], 0 to FOLDS - 1."""
    return (_place(mix(images)) * FOLDS).long()


def round_of(images: Tensor, bounds: Sequence[float]) -> Tensor:
    """Return the round of each image, drawn independently of its part and fold: int64 [I] -> int64 [I].

    Args:
        images: fingerprints of the images.
        bounds: upper bounds from `round_bounds`.
    """
    limits = torch.tensor(bounds[:-1], device=images.device, dtype=torch.float64)
    return torch.bucketize(_place(mix(mix(images))), limits, right=True)


def round_bounds(samples: int) -> list[float]:
    """Return the cumulative shares of the samples at which the rounds of successive halving end.

    Each round but the last is twice as large as all before it.

    >>> round_bounds(1000), round_bounds(160), round_bounds(40)
    ([0.125, 0.375, 1.0], [0.2, 0.6, 1.0], [1.0])
    """
    bounds, bound = [], max(0.125, FIRST_ROUND / max(1, samples))
    while bound < 0.7:  # a smaller last round would decide little
        bounds.append(round(bound, 6))
        bound *= 3
    return [*bounds, 1.0]


def _place(images: Tensor) -> Tensor:
    """Map the fingerprint of each image to a number in [0, 1)."""
    return (images & 0x7FFFFFFF).double() / 2**31
