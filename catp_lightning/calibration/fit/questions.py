"""Fit the components by which question-aware methods tell questions apart: principal components of mean embeddings."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from catp_lightning.calibration.passes import Pass
from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.calibration.sums import Sums
from catp_lightning.methods.observation import Signal
from catp_lightning.methods.question import Question, hashed, hashed_width

MOST = 16
"""Most components of a question. Questions about digit scenes have 13."""

LEAST = 1e-3
"""Smallest standard deviation of a component, as a share of the largest: below it there is little but rounding."""


class QuestionSums(Sums):
    """First and second moments of the questions' hashed mean embeddings.

    Args:
        width: number of dimensions of a hashed embedding, W; 0: questions are not read.
    """

    count: Tensor
    total: Tensor
    products: Tensor

    def __init__(self, width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("count", torch.zeros((), dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(width, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("products", torch.zeros(width, width, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")

    def update(self, questions: Tensor) -> None:
        """Add B questions: float [B, W], hashed mean embeddings."""
        rows = questions.double()
        self.count += len(rows)
        self.total += rows.sum(0)
        self.products += rows.T @ rows

    def compute(self) -> tuple[int, np.ndarray, np.ndarray]:
        """Return, over all processes, the number of questions, their sum [W] and the sum of their products [W, W]."""
        return int(self.count), self.total.cpu().numpy(), self.products.cpu().numpy()


def principal_components(count: int, total: np.ndarray, products: np.ndarray) -> Question | None:
    """Return the principal components of questions, with a standard deviation of 1; None if all questions are equal.

    Components are in the order of their variance, and each has the sign by which its largest weight is positive.

    Args:
        count: number of questions.
        total: float64 [W], their sum.
        products: float64 [W, W], the sum of their products with themselves.
    """
    if count < 2 or not len(total):
        return None
    mean = total / count
    variances, vectors = np.linalg.eigh(products / count - np.outer(mean, mean))
    order = np.argsort(variances)[::-1][:MOST]
    spread = np.sqrt(np.maximum(variances[order], 0))
    kept = spread > LEAST * max(spread[0], float(np.abs(mean).max()) * LEAST)
    if not kept.any():
        return None
    basis = vectors[:, order[kept]].T
    basis *= np.sign(basis[np.arange(len(basis)), np.abs(basis).argmax(1)])[:, None]
    basis /= spread[kept][:, None]
    return Question.of(basis, -basis @ mean)


class Reading(Pass):
    """Pass that reads the questions of the learning part, so that later passes can tell them apart.

    Args:
        width: number of dimensions of the model's word embeddings.
        part_of: part of each image.
        device: device of the sums.
    """

    title = key = "reading the questions"

    def __init__(self, width: int, part_of: Callable[[Tensor], Tensor], device: torch.device | None) -> None:
        self.part_of = part_of
        self.sums = QuestionSums(hashed_width(width)).to(device)
        self.metrics = {"questions": self.sums}

    def see(self, samples: Samples, copies: Sequence[Samples] = ()) -> None:
        rows = hashed(samples.of_images(samples.seen[Signal.QUESTION]))
        self.sums.update(rows[(self.part_of(samples.images) == 0) & rows.isfinite().all(1)])

    def question(self) -> Question | None:
        """Return the components of the questions of all processes, which all must call this; None if all are equal."""
        return principal_components(*self.sums.compute())
