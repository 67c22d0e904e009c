"""Sums over calibration samples, exact under any number of processes; only sums by image grow with the data."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from catp_lightning.calibration.settings import DEFAULTS
from catp_lightning.calibration.split import PARTS


@dataclass  # not frozen: torchmetrics copies what a metric computes field by field
class FoldSums:
    """Sums that a linear regression y = rows . weights needs, for each of K folds; F columns.

    Attributes:
        gram: float64 [K, F, F], sum of row' row.
        moment: float64 [K, F], sum of row' y.
        squares: float64 [K], sum of y squared.
        rows: int64 [K], number of rows.
    """

    gram: np.ndarray
    moment: np.ndarray
    squares: np.ndarray
    rows: np.ndarray

    def without(self, fold: int) -> "FoldSums":
        """Return the sums of all folds but one."""
        return FoldSums(*(np.delete(part, fold, 0) for part in (self.gram, self.moment, self.squares, self.rows)))

    def columns(self, index: Any) -> "FoldSums":
        """Return the sums of the regression on some columns only: `index` int [G], in that order."""
        index = np.asarray(index, dtype=int)
        return FoldSums(self.gram[:, index[:, None], index], self.moment[:, index], self.squares, self.rows)


class Sums(Metric):
    """Base class of calibration sums.

    `compute` before any `update` is legal: a process may have no samples, or all its sums from an earlier run.
    """

    full_state_update = False

    @property
    def update_called(self) -> bool:
        """Always True; otherwise torchmetrics warns when it computes before an update."""
        return True


class ProbeSums(Sums):
    """Sums by fold for the regression of an answer's log-probability on what each probe kept.

    A state is a sum, so several processes add up to exactly what one would have found, whatever batches each had. Of
    each symmetric Gram matrix only the upper triangle is stored, because the metric's default holds one more copy, and
    saving takes two.

    Args:
        columns: number of columns of a probe's row, F.
        folds: number of folds.
    """

    gram: Tensor
    moment: Tensor
    squares: Tensor
    rows: Tensor

    def __init__(self, columns: int, folds: int = DEFAULTS.folds, **kwargs: Any) -> None:
        super().__init__(compute_with_cache=False, **kwargs)  # the result is larger than the sums
        packed = torch.zeros(folds, columns * (columns + 1) // 2, dtype=torch.float64, device="cpu")
        self.add_state("gram", packed, dist_reduce_fx="sum")
        self.add_state("moment", torch.zeros(folds, columns, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(folds, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros(folds, dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")

    def update(self, fold: Tensor, rows: Tensor, gain: Tensor) -> None:
        """Add the probes of B samples at one size; rows and gains are centred by sample here.

        Args:
            fold: int64 [B], fold of each sample's image.
            rows: float [P, B, F], row of each of P probes, as in `Columns`.
            gain: float [P, B], mean log-probability of the unpruned answer's tokens under each.
        """
        gain = (gain.double() - gain.double().mean(0)).T
        triangle = torch.triu_indices(rows.shape[2], rows.shape[2], device=rows.device)
        for number in fold.unique().tolist():
            here = rows[:, fold == number].double()  # one fold at a time, or several copies of all rows would be held
            here = (here - here.mean(0)).transpose(0, 1).flatten(0, 1)
            y = gain[fold == number].flatten()
            self.gram[number] += (here.T @ here)[tuple(triangle)]
            self.moment[number] += here.T @ y
            self.squares[number] += y @ y
            self.rows[number] += len(y)

    def compute(self) -> FoldSums:
        """Return the sums over all processes."""
        packed, *others = (state.cpu().numpy() for state in (self.gram, self.moment, self.squares, self.rows))
        columns = self.moment.shape[1]
        first, second = np.triu_indices(columns)
        gram = np.empty((len(packed), columns, columns))
        gram[:, first, second] = gram[:, second, first] = packed
        return FoldSums(gram, *others)


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


class RankCorrelation(Sums):
    """Mean over images of Spearman's rank correlation between layers' scores of an image's tokens.

    As in figure 4 of 2504.00557, for any scores that come by layer.

    Args:
        layers: number of layers, L.
    """

    correlation: Tensor
    images: Tensor

    def __init__(self, layers: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state(
            "correlation", torch.zeros(layers, layers, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum"
        )
        self.add_state("images", torch.zeros(1, dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")

    def update(self, scores: Tensor) -> None:
        """Add the scores of I images: float [I, L, T], T at least 2. Of equal scores the lower index ranks lower."""
        ranks = scores.argsort(dim=-1, stable=True).argsort(-1).double()
        centred = ranks - ranks.mean(-1, keepdim=True)
        unit = centred / centred.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        self.correlation += (unit @ unit.transpose(1, 2)).sum(0)
        self.images += len(scores)

    def compute(self) -> np.ndarray:
        """Return the mean correlation over the images of all processes: float64 [L, L]."""
        return (self.correlation / self.images.clamp(min=1)).cpu().numpy()


class ImageSet(Sums):
    """Set of the fingerprints of all images (or samples) that were met."""

    met: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("met", [], dist_reduce_fx="cat")

    def update(self, images: Tensor) -> None:
        """Add the fingerprints of I images: int64 [I]."""
        self.met = [torch.cat([*self.met, images]).unique()]

    def compute(self) -> Tensor:
        """Return the fingerprints of all processes, each once: int64 [I], ascending."""
        return (torch.cat(self.met) if isinstance(self.met, list) else self.met).unique()


class PartCounts(Sums):
    """Number of samples in each part of the split."""

    counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", torch.zeros(len(PARTS), dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")

    def update(self, part: Tensor) -> None:
        """Add B samples: int64 [B], the part of each."""
        self.counts += torch.bincount(part, minlength=len(PARTS))

    def compute(self) -> dict[str, int]:
        """Return the number of samples over all processes, by the part's name."""
        return dict(zip(PARTS, self.counts.tolist(), strict=True))


class TokenCounts(Sums):
    """Mean number of visual tokens of an image."""

    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros(2, dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")

    def update(self, counts: Tensor) -> None:
        """Add I images: int64 [I], the number of tokens of each."""
        self.total += torch.stack([counts.sum(), counts.new_tensor(len(counts))])

    def compute(self) -> float:
        """Return the mean over the images of all processes; 0.0 without images."""
        tokens, images = self.total.tolist()
        return float(tokens / max(1, images))


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
