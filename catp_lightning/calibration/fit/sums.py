"""Sums of the probes and counts of the split, exact under any number of processes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from catp_lightning.calibration.settings import DEFAULTS
from catp_lightning.calibration.split import PARTS
from catp_lightning.calibration.sums import Sums


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


class PromptSizes(Sums):
    """Sizes of all prompts, which their prices depend on."""

    rows: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, sizes: Tensor) -> None:
        """Add B prompts: int64 [B, 4], as `Replay.sizes`."""
        self.rows = [torch.cat([*self.rows, sizes])]

    def compute(self) -> Tensor:
        """Return the sizes of the prompts of all processes, int64 [N, 4], in an order that depends on them alone."""
        rows = torch.cat(self.rows) if isinstance(self.rows, list) else self.rows
        different, counts = rows.unique(dim=0, return_counts=True)
        return different.repeat_interleave(counts, 0)


class TokenCounts(Sums):
    """Mean and largest number of visual tokens of an image."""

    total: Tensor
    largest: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros(2, dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("largest", torch.zeros((), dtype=torch.int64, device="cpu"), dist_reduce_fx="max")

    def update(self, droppable: Tensor, valid: Tensor) -> None:
        """Add I images: bool [I, T] each, the tokens that may be dropped, and all tokens."""
        self.total += torch.stack([droppable.sum(), droppable.new_tensor(len(droppable), dtype=torch.int64)])
        self.largest = torch.maximum(self.largest, valid.sum(1).amax())

    def compute(self) -> tuple[float, int]:
        """Return, over the images of all processes, the mean number of tokens that may be dropped, and the most of all.

        Without images both are 0.
        """
        tokens, images = self.total.tolist()
        return float(tokens / max(1, images)), int(self.largest)
