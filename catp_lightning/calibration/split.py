"""Which samples are for what: by image, never by order, so that batches and processes do not matter."""

from collections.abc import Sequence

import torch
from torch import Tensor

from catp_lightning.fingerprint import mix

PARTS = ("learn", "check")
"""Parts of a calibration split: on the first everything is fitted and chosen, the second only checks."""

CHECKED = 0.2
PROMISED = 0.5
"""Share of the images that check; a promise is kept by counting, and needs many that nothing was decided on."""

FOLDS = 5
FIRST_ROUND = 32  # samples; on fewer, good candidates would leave by chance


def part_of(images: Tensor, checked: float = CHECKED) -> Tensor:
    """The part of each image, as a number in `PARTS`: int64 [I] -> int64 [I]. All its questions fall in one part."""
    return (_place(images) >= 1 - checked).long()


def fold_of(images: Tensor) -> Tensor:
    """The fold of each image, drawn apart from its part: int64 [I] -> int64 [I], 0 to FOLDS - 1."""
    return (_place(mix(images)) * FOLDS).long()


def round_of(images: Tensor, bounds: Sequence[float]) -> Tensor:
    """The round in which each image is used, drawn apart from part and fold: int64 [I] -> int64 [I].

    Args:
        images: fingerprints.
        bounds: as `round_bounds`.
    """
    limits = torch.tensor(bounds[:-1], device=images.device, dtype=torch.float64)
    return torch.bucketize(_place(mix(mix(images))), limits, right=True)


def round_bounds(samples: int) -> list[float]:
    """Successive halving's rounds, each larger than all before it: upper bounds of their shares of the samples.

    >>> round_bounds(1000), round_bounds(160), round_bounds(40)
    ([0.125, 0.375, 1.0], [0.2, 0.6, 1.0], [1.0])
    """
    bounds, bound = [], max(0.125, FIRST_ROUND / max(1, samples))
    while bound < 0.7:  # a last round of less than the rest would decide little
        bounds.append(round(bound, 6))
        bound *= 3
    return [*bounds, 1.0]


def _place(images: Tensor) -> Tensor:
    """A number in [0, 1) for each image."""
    return (images & 0x7FFFFFFF).double() / 2**31
