"""Keeps the highest scores, and means of clusters of the next highest (SparseVLM, 2410.04417, section 3)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from catp_lightning.methods.observation import Signal
from catp_lightning.methods.selection import Selection
from catp_lightning.methods.selectors.base import FeatureSelector, ranked
from catp_lightning.methods.selectors.similarity import exact_distances
from catp_lightning.utils.on_cpu import on_cpu


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
        destination = torch.full_like(visual, -1, dtype=torch.int64)
        order = ranked(scores, visual).argsort(1)
        asked, own = on_cpu(counts, visual)
        for row, (budget, tokens) in enumerate(zip(asked.tolist(), own.sum(1).tolist(), strict=True)):
            kept, recycled, clusters = split(budget, tokens)
            best, next_ones = order[row, :kept], order[row, kept : kept + recycled].sort().values
            destination[row, best] = best
            if clusters:
                destination[row, next_ones] = next_ones[nearest_centres(vectors[row, next_ones], clusters)]
        itself = torch.arange(destination.shape[1], device=destination.device)
        return Selection(destination == itself, destination)


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
