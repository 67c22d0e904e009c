"""Sums of probes in which one head of each scorer and two slots carry the answer."""

import torch
from torch import Tensor

from catp_lightning.calibration.fit.probes import Columns, pair_rows, random_subset
from catp_lightning.calibration.fit.sums import FoldSums, ProbeSums
from catp_lightning.calibration.fit.ties import Tolerance
from catp_lightning.calibration.settings import DEFAULTS
from catp_lightning.methods.scorers import CrossAttention, RegionAttention

FOLDS = DEFAULTS.folds


SCORERS_FITTED = {"cross-attention": CrossAttention(), "region-attention": RegionAttention()}
"""Scorers of models with a Q-Former whose heads are fitted."""


COLUMNS = Columns(dict.fromkeys(SCORERS_FITTED, ((0, 1), 4)), 8)
TIES = Tolerance.under(torch.float64)


def probes(noise: float = 0.3, samples: int = 150, seed: int = 0) -> tuple[FoldSums, FoldSums, Tensor, Tensor]:
    """Planted: one head of each scorer and slot 3 carry the answer. The sums, and the centred rows and gains."""
    generator = torch.Generator().manual_seed(seed)
    sums, pairs = ProbeSums(COLUMNS.total), ProbeSums(36)
    fold, visual = torch.arange(samples) % FOLDS, torch.ones(samples, 8, dtype=torch.bool)
    head_scores = torch.randn(samples, 8, 16, dtype=torch.float64, generator=generator)
    worth = torch.zeros(COLUMNS.total, dtype=torch.float64)
    worth[[5, 10, COLUMNS.of_slots[3], COLUMNS.of_slots[6]]] = torch.tensor([0.8, -0.9, 1.5, -0.5]).double()
    kept_rows, gains = [], []
    for size in (4, 2, 1):
        counts = torch.full((samples,), size)
        seeds = torch.arange(samples) * 7919
        kept = torch.stack([random_subset(seeds, visual, counts, 24 * size + n) for n in range(24)]).double()
        rows = torch.cat([torch.einsum("pbt,btv->pbv", kept, head_scores), kept], 2)
        gain = rows @ worth + noise * torch.randn(24, samples, dtype=torch.float64, generator=generator)
        sums.update(fold, rows, gain)
        pairs.update(fold, pair_rows(kept), gain)
        kept_rows.append((rows - rows.mean(0)).flatten(0, 1))
        gains.append((gain - gain.mean(0)).flatten())
    return sums.compute(), pairs.compute(), torch.cat(kept_rows), torch.cat(gains)
