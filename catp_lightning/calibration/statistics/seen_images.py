"""What calibration saw of its images: ranges of a few numbers, by which other images are told later on."""

import math
from typing import Any, ClassVar, Self

import torch
from matplotlib.figure import Figure
from torch import Tensor

from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.calibration.statistics.base import Statistic
from catp_lightning.methods.summary import PRECISION, SUMMARY, summary

LEAST = 16
"""Fewest images that ranges are given for."""


class SeenImages(Statistic):
    """Mean, slope, standard deviation, least and greatest value of each number of an image's summary.

    The slope is the change with the logarithm of the number of an image's tokens, for images of several sizes. An image
    counts once for each question about it; perturbed copies count as images.
    """

    name: ClassVar[str] = "seen"
    caption: ClassVar[str] = ""
    copies: ClassVar[bool] = True

    count: Tensor
    first: Tensor
    second: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        numbers, wide = len(SUMMARY), torch.float64
        self.add_state("count", torch.zeros(1, dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("first", torch.zeros(numbers + 1, dtype=wide, device="cpu"), dist_reduce_fx="sum")
        self.add_state("second", torch.zeros(numbers + 1, numbers + 1, dtype=wide, device="cpu"), dist_reduce_fx="sum")
        self.add_state("low", torch.full((numbers,), math.inf, dtype=wide, device="cpu"), dist_reduce_fx="min")
        self.add_state("high", torch.full((numbers,), -math.inf, dtype=wide, device="cpu"), dist_reduce_fx="max")

    @classmethod
    def of(cls, plan: Plan) -> Self:
        return cls()

    def update(self, samples: Samples) -> None:
        numbers, tokens = summary(samples.seen).double(), samples.seen.droppable.sum(1)
        there = (tokens > 0) & numbers.isfinite().all(1)
        numbers, tokens = numbers[there], tokens[there]
        rows = torch.cat([tokens.double().log()[:, None], numbers], 1)
        self.count += len(rows)
        self.first += rows.sum(0)
        self.second += rows.T @ rows
        if len(rows):
            self.low = self.low.minimum(numbers.amin(0))
            self.high = self.high.maximum(numbers.amax(0))

    def compute(self) -> dict[str, Any]:
        """Return the ranges by the names of `SUMMARY`, and the geometric mean of the number of an image's tokens.

        Empty if there were fewer than 16 images.
        """
        count = int(self.count)
        if count < LEAST:
            return {}
        mean = self.first / count
        covariance = self.second / count - mean[:, None] * mean
        sizes = float(covariance[0, 0])
        slope = covariance[0, 1:] / sizes if sizes > 1e-9 else torch.zeros_like(mean[1:])
        variance = covariance.diagonal()[1:] - slope * covariance[0, 1:]
        std = (variance.clamp(min=0) * count / (count - 2)).sqrt().clamp(min=PRECISION)
        parts = {"mean": mean[1:], "slope": slope, "std": std, "low": self.low, "high": self.high}
        each = {part: values.tolist() for part, values in parts.items()}
        features = {
            name: {part: round(values[number], 4) for part, values in each.items()}
            for number, name in enumerate(SUMMARY)
        }
        return {"images": count, "tokens": round(math.exp(float(mean[0])), 4), "features": features}

    @staticmethod
    def figure(entry: Any) -> Figure | None:
        return None
