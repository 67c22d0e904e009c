"""Summaries of images: the same whatever is beside an image, and outside only where calibration saw nothing like it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from catp_lightning.methods.observation import Observation, Signal
from catp_lightning.methods.summary import SUMMARY, Range, Ranges, summary


def observed(features: Tensor, valid: Tensor | None = None, protected: Tensor | None = None) -> Observation:
    valid = torch.ones(features.shape[:2], dtype=torch.bool) if valid is None else valid
    return Observation(valid, {}, {Signal.IMAGE_FEATURES: features}, protected)


@pytest.fixture
def features() -> Tensor:
    return torch.randn(3, 7, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_numbers_are_those_of_their_definitions() -> None:
    """With up to 256 dimensions nothing is hashed."""
    tokens = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logs = tokens[0].norm(dim=-1).log()
    units = tokens[0] / tokens[0].norm(dim=-1, keepdim=True)
    spectrum = torch.linalg.eigvalsh(units.T.cov(correction=0))
    expected = [
        logs.mean(),
        logs.std(correction=0).log(),
        spectrum.sum().log(),
        (units @ units.T).square().mean().sqrt().log(),
        (spectrum.sum() ** 2 / spectrum.square().sum()).log(),
    ]
    torch.testing.assert_close(summary(observed(tokens))[0], torch.stack(expected))


def test_an_image_has_the_same_summary_whatever_is_beside_it(features: Tensor) -> None:
    alone = torch.cat([summary(observed(image[None])) for image in features])
    torch.testing.assert_close(summary(observed(features)), alone)
    padded = torch.nn.functional.pad(features, (0, 0, 0, 3), value=torch.nan)
    valid = torch.arange(10).expand(3, 10) < 7
    torch.testing.assert_close(summary(observed(padded, valid)), alone)
    torch.testing.assert_close(summary(observed(padded, torch.ones_like(valid), ~valid)), alone)


def test_the_order_of_tokens_does_not_matter(features: Tensor) -> None:
    torch.testing.assert_close(summary(observed(features)), summary(observed(features.flip(1))))


@pytest.mark.parametrize("tokens", [torch.zeros(1, 4, 8), torch.ones(1, 4, 8), torch.ones(1, 1, 8)])
def test_tokens_that_are_all_alike_have_finite_numbers(tokens: Tensor) -> None:
    assert summary(observed(tokens)).isfinite().all()


def ranges(**changes: float) -> Ranges:
    one = replace(Range(mean=0.0, slope=0.0, std=1.0, low=-2.0, high=2.0), **changes)
    return Ranges(8.0, dict.fromkeys(SUMMARY, one))


def outside(value: float, tokens: int = 8, **changes: float) -> bool:
    numbers = torch.zeros(1, len(SUMMARY), dtype=torch.float32)
    numbers[0, 2] = value
    found = ranges(**changes).outside(numbers, torch.tensor([tokens]))
    assert not found[0, [0, 1, 3, 4]].any()
    return bool(found[0, 2])


def test_a_number_is_outside_beyond_five_deviations_and_all_that_was_seen() -> None:
    assert not outside(4.9)
    assert outside(5.1)
    assert outside(-5.1)
    assert not outside(5.1, high=5.2)
    assert not outside(-5.1, low=-5.2)


def test_what_is_usual_depends_on_the_number_of_tokens() -> None:
    assert outside(8.0, 8, slope=4.0)
    assert not outside(8.0, 64, slope=4.0)


def test_a_number_that_is_none_is_outside_and_an_image_without_tokens_is_not() -> None:
    assert outside(torch.nan)
    assert not outside(torch.nan, tokens=0)
