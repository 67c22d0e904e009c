"""Keeps the highest scores, and means of clusters of the next highest (SparseVLM, 2410.04417, section 3)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from catp_lightning.methods.observation import Signal
from catp_lightning.methods.selection import Selection
from catp_lightning.methods.selectors.base import FeatureSelector, ranked
from catp_lightning.methods.selectors.fused import fused
from catp_lightning.methods.selectors.similarity import exact_distances
from catp_lightning.utils.on_cpu import on_cpu, on_device


@dataclass(frozen=True)
class Recycle(FeatureSelector):
    """Keeps the highest scores, and the best 30% of the other tokens as means of clusters (recycled tokens).

    n recycled tokens make n // 10 + 1 clusters. The token at a cluster's centre stays in its place and becomes the
    mean; it counts in the budget, and at most half of the budget are such tokens: with a budget of one nothing is
    recycled. Clusters are found by density peaks on the rows that enter the layer where tokens are dropped: a token's
    density is exp of minus the mean squared distance to its k nearest neighbours, k the number of clusters; centres are
    the tokens with the highest product of density and distance to the nearest denser token (the largest distance of
    all, where no token is denser); the other tokens join the nearest centre. In a tie the lowest index wins.

    The authors' code adds the merged tokens to the budget and puts them after all kept tokens, recycles one token more
    where 30% is a whole number, counts a token among its own nearest neighbours, and draws noise to break ties.
    """

    nested: ClassVar[bool] = False  # a larger budget leaves fewer tokens to recycle
    compared: ClassVar[Signal] = Signal.HIDDEN_STATES
    merges: ClassVar[bool] = True

    def select(self, scores: Tensor, visual: Tensor, counts: Tensor, vectors: Tensor | None) -> Selection:
        assert vectors is not None
        asked, own = on_cpu(counts, visual)
        parts = [split(*sizes) for sizes in zip(asked.tolist(), own.sum(1).tolist(), strict=True)]
        of_rows = torch.tensor(parts, device="cpu", dtype=torch.int64).view(-1, 3).transpose(0, 1).contiguous()
        carriers = _carriers(vectors, ranked(scores, visual), on_device(of_rows, visual.device))
        itself = torch.arange(carriers.shape[1], dtype=torch.int64, device=carriers.device)
        return Selection(carriers == itself, carriers)


@fused("recycle")
def _carriers(vectors: Tensor, rank: Tensor, parts: Tensor) -> Tensor:
    """Return the token that carries each: int64 [R, T], itself if it is kept, -1 if it is dropped.

    Args:
        vectors: float [R, T, D].
        rank: int64 [R, T], of the tokens by their scores.
        parts: int64 [3, R], with a copy on the CPU: what `split` gives for each row.
    """
    carriers, order = torch.full_like(rank, -1), rank.argsort(1)
    for row, (kept, recycled, clusters) in enumerate(zip(*on_cpu(parts)[0].tolist(), strict=True)):
        best, next_ones = order[row, :kept], order[row, kept : kept + recycled].sort().values
        carriers[row, best] = best
        if clusters:
            carriers[row, next_ones] = next_ones[nearest_centres(vectors[row, next_ones], clusters)]
    return carriers


def split(budget: int, tokens: int) -> tuple[int, int, int]:
    """Number of tokens kept, of tokens recycled, and of clusters; kept tokens and clusters add up to the budget.

    >>> split(60, 200), split(1, 9), split(9, 9)
    ((55, 44, 5), (1, 0, 0), (9, 0, 0))
    """
    if budget >= tokens:
        return tokens, 0, 0
    clusters = next(n for n in range(budget + 1) if n == budget // 2 or n >= _clusters(tokens - budget + n))
    return budget - clusters, _recycled(tokens - budget + clusters) if clusters else 0, clusters


def _recycled(dropped: int) -> int:
    return -(-3 * dropped // 10)  # 30%, rounded up


def _clusters(dropped: int) -> int:
    return _recycled(dropped) // 10 + 1


def nearest_centres(vectors: Tensor, clusters: int) -> Tensor:
    """Density-peak clustering: the index of the centre that each token belongs to.

    Args:
        vectors: float [n, D], n tokens.
        clusters: number of clusters, from 1 to n.

    Returns:
        int64 [n], indices from 0 to n - 1; a centre belongs to itself.
    """
    count, size = vectors.shape
    apart = exact_distances(vectors) / size**0.5
    place = torch.arange(count, device=vectors.device)
    nearest = apart.clone().fill_diagonal_(torch.inf).topk(min(clusters, max(1, count - 1)), largest=False).values
    density = -nearest.square().mean(1)  # log density: exp would round that of far tokens to 0
    denser = (density > density[:, None]) | ((density == density[:, None]) & (place < place[:, None]))
    distance = apart.masked_fill(~denser, torch.inf).amin(1)
    distance = distance.where(denser.any(1), apart.max())
    order = ranked((density + distance.log())[None], torch.ones_like(denser[:1]))[0]
    centres = order.argsort()[:clusters].sort().values
    return place.where(order < clusters, centres[apart[:, centres].argmin(1)])
