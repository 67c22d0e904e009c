"""Texts of questions, and those that are lowest and highest in each component: what a component means."""

from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from catp_lightning.calibration.replay.base import text_fingerprint
from catp_lightning.calibration.sums import Sums
from catp_lightning.methods.components import HASHED, Question, hashed

MOST = 256
"""Most distinct questions that are recorded: those with the smallest fingerprints, whoever has read them."""

LONGEST = 64
"""Most token ids of a question that are recorded, its first."""

SHOWN = 3
"""Most questions at each end of a component."""


class QuestionComponent(TypedDict):
    """A component of questions: its share of their variance, and the distinct questions lowest and highest in it.

    A question is given as the token ids of its text, without padding and visual tokens, the first 64; of a prompt whose
    text follows an image, as the text after the image. Among 256 questions of the learning part at most, the extreme
    one is first. No question is at both ends.
    """

    variance: float
    low: list[list[int]]
    high: list[list[int]]


class QuestionTexts(Sums):
    """The `MOST` distinct questions with the smallest fingerprints, with the embedding of each.

    Which questions these are does not depend on the order or the number of processes in which they are read.
    """

    keys: list[Tensor]
    ids: list[Tensor]
    embeddings: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("keys", "ids", "embeddings"):
            self.add_state(name, [], dist_reduce_fx="cat")
        nothing = torch.zeros(0, 0, dtype=torch.int64, device="cpu")
        self.update(nothing, nothing.double())  # a process may have no batch

    def update(self, ids: Tensor, embeddings: Tensor) -> None:
        """Add N questions, except those whose embedding is not finite.

        Args:
            ids: int64 [N, R], token ids of each text, then -1.
            embeddings: float [N, D], mean embedding of each text.
        """
        finite = embeddings.isfinite().all(1)
        ids, rows = ids[finite], hashed(embeddings[finite].double()).float()
        new = (
            text_fingerprint(ids, ids >= 0),
            F.pad(ids[:, :LONGEST], (0, max(0, LONGEST - ids.shape[1])), value=-1),
            F.pad(rows, (0, HASHED - rows.shape[1])),
        )
        before = (self.keys, self.ids, self.embeddings)
        several = [torch.cat([*old, added]) for old, added in zip(before, new, strict=True)]
        self.keys, self.ids, self.embeddings = ([part] for part in _smallest(*several))

    def compute(self) -> tuple[list[list[int]], Tensor]:
        """Return the ids of the questions of all processes in the order of fingerprints, and hashed embeddings.

        Returns:
            The ids of N questions, and float32 [N, 256], in which columns beyond the embedding's width are 0.
        """
        every = (torch.cat(part) if isinstance(part, list) else part for part in (self.keys, self.ids, self.embeddings))
        _, ids, embeddings = _smallest(*every)
        return [[token for token in row if token >= 0] for row in ids.tolist()], embeddings.cpu()


def described(question: Question, variance: float, texts: tuple[list[list[int]], Tensor]) -> list[QuestionComponent]:
    """Return each component with the questions that are lowest and highest in it.

    Args:
        question: the components, each with a standard deviation of 1.
        variance: variance of the questions' hashed embeddings, summed over dimensions.
        texts: as `QuestionTexts` computes them.
    """
    ids, embeddings = texts
    rows = question.rows().astype(np.float64)
    # Rounded, so that questions of the same words are in the order of fingerprints, whatever their batches.
    values = question.of_embeddings(embeddings[:, : rows.shape[1]].double()).numpy().round(3)
    shares = 1 / (rows**2).sum(1) / variance  # a row is a unit vector divided by the component's standard deviation
    few = min(SHOWN, len(ids) // 2)
    found: list[QuestionComponent] = []
    for share, value in zip(shares, values.T, strict=True):
        order = value.argsort(kind="stable").tolist()
        low, high = order[:few], order[::-1][:few]
        found.append({"variance": float(share), "low": [ids[n] for n in low], "high": [ids[n] for n in high]})
    return found


def _smallest(keys: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Return at most `MOST` keys, int64 [N], each once and in ascending order, and the rows of `values` at them."""
    order = keys.argsort(stable=True)
    ascending = keys[order]
    new = torch.ones_like(ascending, dtype=torch.bool)
    new[1:] = ascending[1:] != ascending[:-1]
    places = order[new][:MOST]
    return keys[places], *(value[places] for value in values)
