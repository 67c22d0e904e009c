"""Sums of candidates' answers, exact under any number of processes; rows by sample and by image grow with the data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from catp_lightning.calibration.sums import Sums


class CandidateSums(Sums):
    """Sums of each candidate's divergence and agreement at each budget on the samples of one round.

    Args:
        budgets: number of budgets, K.
        candidates: number of candidates, C.
    """

    divergence: Tensor
    squares: Tensor
    agreed: Tensor
    count: Tensor

    def __init__(self, budgets: int, candidates: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        shape = (budgets, candidates)
        self.add_state("divergence", torch.zeros(shape, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(shape, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("agreed", torch.zeros(shape, dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(shape, dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")

    def update(self, budget: int, candidates: Tensor, divergence: Tensor, agreed: Tensor) -> None:
        """Add the answers of N candidates to B samples at one budget.

        Args:
            budget: index of the budget, 0 to K - 1.
            candidates: int64 [N], indices of the candidates that answered.
            divergence: float [N, B], divergence from the unpruned answers, in nats.
            agreed: bool [N, B], True if the answer is the unpruned one.
        """
        divergence = divergence.double()
        self.divergence[budget, candidates] += divergence.sum(1)
        self.squares[budget, candidates] += (divergence**2).sum(1)
        self.agreed[budget, candidates] += agreed.sum(1)
        self.count[budget, candidates] += agreed.shape[1]

    def compute(self) -> dict[str, np.ndarray]:
        """Return the sums over all processes: `divergence`, `squares`, `agreed` and `count`, each [K, C]."""
        return {name: getattr(self, name).cpu().numpy() for name in ("divergence", "squares", "agreed", "count")}


@dataclass  # not frozen: torchmetrics copies what a metric computes field by field
class Rows:
    """Answers of A candidates, at one budget, to N samples, in an order that does not depend on batches.

    Attributes:
        images: int64 [N], fingerprint of each sample's image.
        questions: float64 [N, C], components of its question; C is 0 if questions are not known.
        divergence: float64 [N, A], in nats.
        agreed: float64 [N, A], 1 where the answer is the unpruned one.
    """

    images: np.ndarray
    questions: np.ndarray
    divergence: np.ndarray
    agreed: np.ndarray

    def of(self, places: Sequence[int]) -> "Rows":
        """Return the answers of some of the candidates."""
        return Rows(self.images, self.questions, self.divergence[:, places], self.agreed[:, places])

    @staticmethod
    def joined(several: Sequence["Rows"]) -> "Rows":
        """Return the answers of the same candidates to the samples of several rounds."""
        names = ("images", "questions", "divergence", "agreed")
        return Rows(*(np.concatenate([getattr(rows, name) for rows in several]) for name in names))


class CandidateAnswers(Sums):
    """Divergence and agreement of every candidate on every sample of one round, to compare candidates by sample.

    Args:
        alive: number of candidates at each budget.
        components: number of components of a question, C.
    """

    ids: list[Tensor]
    values: list[Tensor]

    def __init__(self, alive: Sequence[int], components: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alive, self.components = tuple(alive), components
        self.add_state("ids", [], dist_reduce_fx="cat")
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, keys: Tensor, images: Tensor, questions: Tensor, answers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add B samples.

        Args:
            keys: int64 [B], checksum of image and question.
            images: int64 [B], fingerprint of the image.
            questions: float [B, C], components of the question.
            answers: for each budget the divergence of its candidates, float [A, B], and where they agree, bool [A, B].
        """
        self.ids.append(torch.stack([keys, images], 1))
        found = [part.double().T for answer in answers for part in answer]
        self.values.append(torch.cat([questions.double(), *found], 1))

    def first(self) -> tuple[np.ndarray, np.ndarray]:
        """Return, of this process, checksums of samples, int64 [N], and where the first candidate agrees, bool [N, K].

        K is the number of budgets. It is asked before `compute`, which may join the answers of several processes.
        """
        ids, values = (torch.cat(part).cpu().numpy() for part in (self.ids, self.values))
        starts = self.components + np.cumsum([0, *(2 * count for count in self.alive[:-1])])
        return ids[:, 0], values[:, [start + count for start, count in zip(starts, self.alive, strict=True)]] > 0

    def compute(self) -> list[Rows]:
        """Return the answers of all processes for each budget, sorted by the samples' checksums."""
        parts = (torch.cat(part) if isinstance(part, list) else part for part in (self.ids, self.values))
        ids, values = (part.cpu().numpy() for part in parts)
        order = ids[:, 0].argsort(kind="stable")
        images, values = ids[order, 1], values[order]
        questions, rest = values[:, : self.components], values[:, self.components :]
        ends = np.cumsum([2 * count for count in self.alive])[:-1]
        halves = (np.split(both, 2, axis=1) for both in np.split(rest, ends, axis=1))
        return [Rows(images, questions, *both) for both in halves]


class ImageAgreement(Sums):
    """Number of questions about each image, and of those to which each candidate gave the unpruned answer.

    Candidates are compared image by image, since answers to questions about one image are correlated.

    Args:
        budgets: number of budgets, K.
        candidates: number of candidates at each budget, R.
    """

    rows: list[Tensor]

    def __init__(self, budgets: int, candidates: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shape = (budgets, candidates)
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, images: Tensor, agreed: Tensor) -> None:
        """Add B samples: image checksums int64 [B]; bool [K, R, B], True if an answer is the unpruned one."""
        ones = torch.ones_like(images)
        rows = torch.cat([images[:, None], ones[:, None], agreed.flatten(0, 1).T.long()], 1)
        self.rows = [_sum_of_each(torch.cat([*self.rows, rows]))]

    def compute(self) -> tuple[np.ndarray, np.ndarray]:
        """Return, over all processes, questions about each image int64 [I], and unpruned answers to them [I, K, R]."""
        rows = _sum_of_each(torch.cat(self.rows) if isinstance(self.rows, list) else self.rows).cpu().numpy()
        return rows[:, 1], rows[:, 2:].reshape(-1, *self.shape)


def _sum_of_each(rows: Tensor) -> Tensor:
    """Add up rows with equal first column: int64 [N, W] -> [M, W], W columns, sorted by the first, ascending."""
    first, place = rows[:, 0].unique(return_inverse=True)
    sums = rows.new_zeros(len(first), rows.shape[1] - 1).index_add_(0, place, rows[:, 1:])
    return torch.cat([first[:, None], sums], 1)
