"""Split samples into parts, folds and rounds by image, never by order: batches and processes do not matter."""

from collections.abc import Sequence

import torch
from torch import Tensor

from catp_lightning.calibration.settings import DEFAULTS
from catp_lightning.utils.hashing import mix

PARTS = ("learn", "check")
"""Parts of a calibration split: everything is fitted and chosen on the first; the second only checks."""


def part_of(images: Tensor, checked: float = DEFAULTS.checked) -> Tensor:
    """Return the part of each image as an index into `PARTS`: int64 [I] -> int64 [I]. All its questions are in it."""
    return (_place(images) >= 1 - checked).long()


def fold_of(images: Tensor, folds: int = DEFAULTS.folds) -> Tensor:
    """Return the fold of each image, drawn independently of its part: int64 [I] -> int64 [I], 0 to folds - 1."""
    return (_place(mix(images)) * folds).long()


def round_of(images: Tensor, bounds: Sequence[float]) -> Tensor:
    """Return the round of each image, drawn independently of its part and fold: int64 [I] -> int64 [I].

    Args:
        images: fingerprints of the images.
        bounds: upper bounds from `round_bounds`.
    """
    limits = torch.tensor(bounds[:-1], device=images.device, dtype=torch.float64)
    return torch.bucketize(_place(mix(mix(images))), limits, right=True)


def round_bounds(samples: int, first_round: int = DEFAULTS.first_round) -> list[float]:
    """Return the cumulative shares of the samples at which the rounds of successive halving end.

    Each round but the last is twice as large as all before it; the first has at least `first_round` samples.

    >>> round_bounds(1000), round_bounds(160), round_bounds(40)
    ([0.125, 0.375, 1.0], [0.2, 0.6, 1.0], [1.0])
    """
    bounds, bound = [], max(0.125, first_round / max(1, samples))
    while bound < 0.7:  # a smaller last round would decide little
        bounds.append(round(bound, 6))
        bound *= 3
    return [*bounds, 1.0]


def _place(images: Tensor) -> Tensor:
    """Map the fingerprint of each image to a number in [0, 1)."""
    return (images & 0x7FFFFFFF).double() / 2**31
