"""Sums over calibration samples: constant memory, exact under any number of processes."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

PARTS = ("choose", "check")
"""Parts of the calibration split that candidates are compared on; what comes before them is for fitting."""

FIT, CHOOSE = 350, 450  # of a thousand images; the rest checks


class CandidateSums(Metric):
    """What each candidate did at each budget, in each part of the calibration split.

    A state is a sum, so several processes add up to exactly what one would have found, whatever batches each had.

    Args:
        budgets: number of budgets, K.
        candidates: number of candidates, C.
    """

    full_state_update = False
    divergence: Tensor
    squares: Tensor
    agreed: Tensor
    count: Tensor

    def __init__(self, budgets: int, candidates: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        shape = (len(PARTS), budgets, candidates)
        self.add_state("divergence", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("agreed", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(len(PARTS), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, part: Tensor, divergence: Tensor, agreed: Tensor) -> None:
        """Add a batch.

        Args:
            part: int64 [B], which of `PARTS` each sample belongs to, by its number.
            divergence: float [K, C, B], from the unpruned answers, in nats.
            agreed: bool [K, C, B], whether the answer is the unpruned one.
        """
        belongs = torch.nn.functional.one_hot(part, len(PARTS))
        divergence, weight = divergence.double(), belongs.double()
        self.divergence += torch.einsum("kcb,bp->pkc", divergence, weight)
        self.squares += torch.einsum("kcb,bp->pkc", divergence**2, weight)
        self.agreed += torch.einsum("kcb,bp->pkc", agreed.double(), weight).round().long()
        self.count += belongs.sum(0)

    def compute(self) -> dict[str, Tensor]:
        """Sums over all processes: `divergence`, `squares`, `agreed` [parts, K, C] and `count` [parts]."""
        return {name: getattr(self, name) for name in ("divergence", "squares", "agreed", "count")}


def part_of(images: Tensor) -> Tensor:
    """The part of the split of each image, by its fingerprint, never by its order: int64 [I] -> int64 [I].

    -1 is for fitting, 0 for choosing, 1 for checking. All questions about one image fall in one part.
    """
    place = (images & 0x7FFFFFFF) % 1000
    return (place >= FIT).long() + (place >= FIT + CHOOSE).long() - 1
