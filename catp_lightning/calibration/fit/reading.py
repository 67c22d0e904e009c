"""Fit the components by which questions, and visual tokens, are told apart: principal components of embeddings."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from catp_lightning.calibration.fit.texts import QuestionComponent, QuestionTexts, described
from catp_lightning.calibration.passes import Pass
from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.calibration.sums import Sums
from catp_lightning.methods.components import HASHED, Components, Features, Question, hashed
from catp_lightning.methods.observation import Signal
from catp_lightning.methods.selection import sample_of_images

MOST = 16
"""Most components of a question, or of a token. Questions about digit scenes have 13."""

LEAST = 1e-3
"""Smallest standard deviation of a component, as a share of the largest: below it there is little but rounding."""

Kind = TypeVar("Kind", bound=Components)


class EmbeddingSums(Sums):
    """First and second moments of hashed embeddings, of W dimensions."""

    count: Tensor
    width: Tensor
    total: Tensor
    products: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        zero = torch.zeros((), dtype=torch.int64, device="cpu")
        self.add_state("count", zero, dist_reduce_fx="sum")
        self.add_state("width", zero.clone(), dist_reduce_fx="max")
        self.add_state("total", torch.zeros(HASHED, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("products", torch.zeros(HASHED, HASHED, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")

    def update(self, embeddings: Tensor) -> None:
        """Add N embeddings: float [N, D]; those that are not finite are left out."""
        rows = hashed(embeddings[embeddings.isfinite().all(1)].double())
        self.width = torch.maximum(self.width, torch.full_like(self.width, rows.shape[1]))
        rows = F.pad(rows, (0, HASHED - rows.shape[1]))
        self.count += len(rows)
        self.total += rows.sum(0)
        self.products += rows.T @ rows

    def compute(self) -> tuple[int, np.ndarray, np.ndarray]:
        """Return, over all processes, the number of embeddings, their sum [W] and the sum of their products [W, W]."""
        width = int(self.width)
        return int(self.count), self.total[:width].cpu().numpy(), self.products[:width, :width].cpu().numpy()


def principal_components(kind: type[Kind], count: int, total: np.ndarray, products: np.ndarray) -> Kind | None:
    """Return the principal components of embeddings, with a standard deviation of 1; None if all are equal.

    Components are in the order of their variance, and each has the sign by which its largest weight is positive.

    Args:
        kind: class of the components.
        count: number of embeddings.
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
    return kind.of(basis, -basis @ mean)


class Reading(Pass):
    """Pass that reads questions and visual tokens of the learning part, so that later passes can tell them apart.

    Args:
        part_of: part of each image.
        device: device of the sums.
    """

    title = key = "reading the questions"

    def __init__(self, part_of: Callable[[Tensor], Tensor], device: torch.device | None) -> None:
        self.part_of = part_of
        self.questions, self.tokens = EmbeddingSums().to(device), EmbeddingSums().to(device)
        self.texts = QuestionTexts().to(device)
        self.metrics = {"questions": self.questions, "tokens": self.tokens, "texts": self.texts}

    def see(self, samples: Samples, copies: Sequence[Samples] = ()) -> None:
        learning = self.part_of(samples.images) == 0
        questions = samples.of_images(samples.seen[Signal.QUESTION])
        self.questions.update(questions[learning])
        asked = learning & samples.visual.any(1)  # a sample without images has no embedding
        self.texts.update(samples.replay.text_ids[asked], questions[asked])
        seen = samples.seen
        own = seen.droppable & learning[sample_of_images(seen.valid, samples.visual)][:, None]
        self.tokens.update(seen[Signal.IMAGE_FEATURES][own])

    def components(self) -> tuple[Question, Features] | None:
        """Return the components of the questions and tokens of all processes; each must call this.

        None if all questions, or all tokens, are equal.
        """
        question = principal_components(Question, *self.questions.compute())
        features = principal_components(Features, *self.tokens.compute())
        return None if question is None or features is None else (question, features)

    def described(self, question: Question) -> list[QuestionComponent]:
        """Return what the components of questions mean, from the questions of all processes; each must call this."""
        count, total, products = self.questions.compute()
        variance = float(np.trace(products) / count - total @ total / count**2)
        return described(question, variance, self.texts.compute())
