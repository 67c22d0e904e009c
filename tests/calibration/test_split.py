"""Parts, folds and rounds of a split."""

import pytest
import torch

from catp_lightning.calibration.settings import DEFAULTS
from catp_lightning.calibration.split import fold_of, part_of, round_bounds, round_of

FOLDS = DEFAULTS.folds


def test_parts_folds_and_rounds_follow_the_image_and_are_drawn_apart() -> None:
    images = torch.randint(-(2**62), 2**62, (20_000,))
    part, fold, turn = part_of(images), fold_of(images), round_of(images, round_bounds(1000))
    assert torch.equal(part.flip(0), part_of(images.flip(0)))
    shares = torch.bincount(part) / len(part)
    assert shares.tolist() == pytest.approx([0.8, 0.2], abs=0.02)
    for number in range(2):
        inside = part == number
        assert (torch.bincount(fold[inside]) / inside.sum()).tolist() == pytest.approx([0.2] * FOLDS, abs=0.02)
        assert (torch.bincount(turn[inside]) / inside.sum()).tolist() == pytest.approx([0.125, 0.25, 0.625], abs=0.02)
