"""Summary of an image in a few numbers, and the range that a calibration saw of them: what tells images far outside."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from catp_lightning.methods.components import hashed
from catp_lightning.methods.observation import Observation, Signal
from catp_lightning.methods.precision import without_autocast
from catp_lightning.utils.on_cpu import on_device_as

SUMMARY: Mapping[str, str] = {
    "norm": "mean log L2 norm of the tokens",
    "norm spread": "log standard deviation of the tokens' log norms",
    "direction spread": "log variance of the tokens' directions",
    "similarity": "log root mean square of the cosines between tokens",
    "directions": "log effective number of dimensions in which the tokens' directions differ",
}
"""The S numbers of a summary, by name. All are logarithms."""

DEVIATIONS = 5.0
"""Standard deviations of the calibration's images within which a number is never far outside."""

PRECISION = 0.002
"""Least standard deviation: logarithms that differ by less than a hundredth are equal in any precision."""


def summary(seen: Observation) -> Tensor:
    """Return the numbers of `SUMMARY` for each image: float32 or float64 [I, S].

    Only the image's droppable tokens count, whatever other images are in the batch. NaN for an image without any.

    Args:
        seen: signals with `Signal.IMAGE_FEATURES`.
    """
    found = seen[Signal.IMAGE_FEATURES]
    with without_autocast(found):
        there = seen.droppable[..., None]
        # Nothing of padding or of protected tokens may enter a sum, not even a NaN.
        features = found.to(torch.promote_types(found.dtype, torch.float32)).masked_fill(~there, 0.0)
        count = there.sum(1)
        norms = features.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        logs = norms.log().where(there, 0.0)
        level = logs.sum(1) / count
        spread = ((logs - level[:, None]).where(there, 0.0).square().sum(1) / count).sqrt()
        # The products of many dimensions are about those of 256 hashed ones, which cost less.
        units = hashed((features / norms).flatten(0, 1)).unflatten(0, features.shape[:2])
        mean = units.sum(1) / count
        centred = (units - mean[:, None]).where(there, 0.0)
        variance = centred.square().sum((1, 2)) / count[:, 0]
        gram = centred.transpose(1, 2) @ centred / count[..., None]
        squares = gram.square().sum((1, 2))
        similar = (gram + mean[:, :, None] * mean[:, None]).square().sum((1, 2)).sqrt()
        effective = variance.clamp(min=1e-9).square() / squares.clamp(min=1e-18)
        # Behind a norm layer all tokens may have one norm: what is left of spreads then is rounding.
        parts = ((spread[:, 0], 1e-3), (variance, 1e-6), (similar, 1e-3), (effective, 1e-3))
        numbers = [level[:, 0], *(part.clamp(min=least).log() for part, least in parts)]
    return torch.stack(numbers, 1).detach()


@dataclass(frozen=True)
class Range:
    """Range of one number of the summary over a calibration's images.

    Attributes:
        mean: mean of the number.
        slope: how it changes with the logarithm of the number of an image's tokens.
        std: standard deviation around that line.
        low, high: least and greatest value.

    Raises:
        ValueError: `std` is not positive, or `low` is more than `high`.
    """

    mean: float
    slope: float
    std: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if self.std <= 0 or self.low > self.high:
            raise ValueError(f"std is {self.std}, low {self.low} and high {self.high}; std > 0 and low <= high.")


@dataclass(frozen=True)
class Ranges:
    """Ranges of the summary of images that a calibration saw.

    Attributes:
        tokens: geometric mean of the number of an image's tokens.
        features: ranges by the names of `SUMMARY`.

    Raises:
        ValueError: `tokens` is not positive, or the names are not those of `SUMMARY`.
    """

    tokens: float
    features: Mapping[str, Range]

    def __post_init__(self) -> None:
        if self.tokens <= 0 or self.features.keys() != SUMMARY.keys():
            raise ValueError(f"tokens is {self.tokens} and features are of {sorted(self.features)!r:.200}.")

    def outside(self, numbers: Tensor, tokens: Tensor) -> Tensor:
        """Return which numbers of which images are far outside of the calibration's: bool [I, S].

        A number is far outside if it is beyond all that calibration saw, and beyond 5 standard deviations from what is
        usual for an image with as many tokens; a number that is NaN too. An image without tokens is never outside.

        Args:
            numbers: float [I, S], as from `summary`.
            tokens: int64 [I], number of droppable tokens of each image.
        """
        ranges = [self.features[name] for name in SUMMARY]
        rows = [[of.mean, of.slope, of.std, of.low, of.high] for of in ranges]
        mean, slope, std, low, high = on_device_as(numbers, torch.tensor(rows, dtype=torch.float64, device="cpu").T)
        sizes = tokens.clamp(min=1).to(numbers.dtype).log() - math.log(self.tokens)
        usual = mean + sizes[:, None] * slope
        inside = (numbers >= low.minimum(usual - DEVIATIONS * std)) & (
            numbers <= high.maximum(usual + DEVIATIONS * std)
        )
        return ~inside & (tokens > 0)[:, None]
