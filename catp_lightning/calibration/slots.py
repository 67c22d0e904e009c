"""What each query slot is worth to the model's answers, from random subsets: the slot prior."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from catp_lightning.fingerprint import mix, uniform

PROBES = 16
"""Random subsets of each sample at each budget."""


class SlotSums(Metric):
    """Sums for a regression of answer log-probability on which slots were kept, one for each budget.

    With m a random subset and y the log-probability of the unpruned answer when only m is read, both centred over the
    probes of the sample, y = m . weights. Its Gram matrix and moments are all that is kept: constant memory, and
    several processes add up to what one would have found.

    Args:
        budgets: number of budgets, K.
        slots: visual tokens of an image, T.
    """

    full_state_update = False
    gram: Tensor
    moment: Tensor
    samples: Tensor

    def __init__(self, budgets: int, slots: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("gram", torch.zeros(budgets, slots, slots, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("moment", torch.zeros(budgets, slots, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, budget: int, kept: Tensor, gain: Tensor) -> None:
        """Add the probes of a batch at one budget.

        Args:
            budget: which, 0 to K - 1.
            kept: float [P, B, T], how many tokens of each slot each probe kept; 0 or 1 where a sample has one image.
            gain: float [P, B], mean log-probability of the answer's tokens.
        """
        centred = (kept - kept.mean(0)).double().flatten(0, 1)  # which takes every sample's level out of `gain` too
        self.samples += kept.shape[1] * (budget == 0)
        self.gram[budget] += centred.T @ centred
        self.moment[budget] += centred.T @ gain.double().flatten()

    def compute(self) -> tuple[Tensor, Tensor]:
        """Over all processes: the worth of each slot at each budget, float64 [K, T], 0 where nothing could be learned;
        and how many samples were probed.
        """
        size = self.gram.shape[-1]
        ridge = 0.01 * self.gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
        eye = torch.eye(size, dtype=self.gram.dtype, device=self.gram.device)
        return torch.linalg.solve(self.gram + ridge[:, None, None] * eye, self.moment), self.samples


def random_subset(images: Tensor, visual: Tensor, counts: Tensor, number: int) -> Tensor:
    """The `number`-th random subset of each sample: drawn from its image, so that batches and ranks do not matter.

    Args:
        images: int64 [B], a fingerprint of each sample.
        visual: bool [B, T], which visual tokens it has.
        counts: int64 [B], how many to keep.
        number: of the subset.

    Returns:
        bool [B, T].
    """
    draws = uniform(mix(images + mix(torch.tensor(number, device=images.device))), visual.shape[1])
    return draws.masked_fill(~visual, 2).argsort(1).argsort(1) < counts[:, None]
