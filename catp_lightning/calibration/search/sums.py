"""Sums of candidates' answers, exact under any number of processes; only sums by image grow with the data."""

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


class DrawnQuestions(Sums):
    """Agreement on one question of each image, drawn at random among those asked about it in any process.

    A promise counts images, since two questions about one image are not two independent samples. The draw is by a
    checksum of image and question together, so that each of an image's questions is equally likely, whatever its text;
    by a checksum of the text alone the same kind of question would be drawn for nearly every image.

    Args:
        budgets: number of budgets, K.
    """

    rows: list[Tensor]

    def __init__(self, budgets: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.budgets = budgets
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, images: Tensor, draws: Tensor, agreed: Tensor) -> None:
        """Add B samples.

        Args:
            images: int64 [B], checksum of each sample's image.
            draws: int64 [B], checksum of image and question together; the smallest of an image is drawn.
            agreed: bool [K, B], True if the answer at a budget is the unpruned one.
        """
        rows = torch.cat([images[:, None], draws[:, None], agreed.T.long()], 1)
        self.rows = [_first_of_each(torch.cat([*self.rows, rows]))]

    def compute(self) -> tuple[int, list[int]]:
        """Return the number of images over all processes, and for each budget the number on which it disagrees."""
        rows = torch.cat(self.rows) if isinstance(self.rows, list) else self.rows
        agreed = _first_of_each(rows)[:, 2:]
        return len(agreed), (1 - agreed).sum(0).tolist()


def _first_of_each(rows: Tensor) -> Tensor:
    """Return, of rows with equal first column, the one with the smallest second: [N, W] -> [M, W], W columns."""
    rows = rows[rows[:, 1].argsort(dim=0, stable=True)]
    rows = rows[rows[:, 0].argsort(dim=0, stable=True)]
    new = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    new[1:] = rows[1:, 0] != rows[:-1, 0]
    return rows[new]


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
