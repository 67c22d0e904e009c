"""Counts by question: how many tokens a sample keeps depends on what it asks, and the policy's budget is their mean."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from catp_lightning.methods.components import Question
from catp_lightning.methods.method import Method
from catp_lightning.methods.observation import Needs, Observation, Signal, join
from catp_lightning.methods.selection import Selection
from catp_lightning.utils.on_cpu import on_device_as

MOST = 4.0
"""Largest multiple of the budget that a question gets, one over the smallest: what a calibration measures."""


@dataclass(frozen=True)
class Counts:
    """Multiple of the budget that a question gets, from what its answer is predicted to lose.

        loss(q, n) = exp(h . q + c) n^-b,  multiple(q) = exp(h . q / (1 + b) + constant), from 1/4 to 4

    for a question with components q of whose images n tokens are kept. With these multiples one more token lowers the
    predicted loss of every question by as much, so that at this mean of n no other counts have a lower mean.

    Attributes:
        question: the C components of a question.
        weights: C + 1 numbers, h / (1 + b) and the constant, by which the mean count is the budget.

    Raises:
        ValueError: there is another number of weights.
    """

    question: Question
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.weights) != self.question.count + 1:
            raise ValueError(f"weights are {len(self.weights)} numbers; there are {self.question.count + 1}.")

    def factors(self, seen: Observation) -> Tensor:
        """Return the multiple of the budget that each image keeps: float [I]."""
        components = self.question.components(seen)
        weights = on_device_as(components, torch.tensor(self.weights, dtype=torch.float64, device="cpu"))
        logarithms = components @ weights[:-1] + weights[-1]
        return logarithms.clamp(-math.log(MOST), math.log(MOST)).exp()


@dataclass(frozen=True)
class Counted(Method):
    """Method under which samples keep different numbers of tokens, by their questions.

    Attributes:
        scorer, selector: those of the method.
        method: says which tokens stay.
        counts: says how many.
    """

    method: Method
    counts: Counts

    @classmethod
    def of(cls, method: Method, counts: Counts) -> "Counted":
        return cls(method.scorer, method.selector, method, counts)

    @property
    def rules(self) -> tuple[Method, ...]:
        return self.method.rules

    @property
    def needs(self) -> Needs:
        return join([{Signal.QUESTION: None}, self.method.needs])

    @property
    def nested(self) -> bool:
        return False  # one ranking is not enough: counts differ between samples

    def select(self, seen: Observation, keep: int | float, visual: Tensor) -> Selection:
        return self.method.select(replace(seen, factors=self.counts.factors(seen)), keep, visual)
