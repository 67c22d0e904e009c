"""Keeps tokens as far from each other as possible, found greedily (DivPrune, 2503.02175)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from catp_lightning.methods.selectors.base import FeatureSelector
from catp_lightning.methods.selectors.fused import fused
from catp_lightning.methods.selectors.similarity import rounded_similarity
from catp_lightning.utils.on_cpu import for_numpy


@dataclass(frozen=True)
class MaxMin(FeatureSelector):
    """Keeps, step by step, the token farthest from the nearest token kept; distance is 1 - cosine (algorithm 1).

    Scores are ignored. The first token is the one whose nearest other token is farthest away. Where distances are equal
    the lowest index wins; a token with NaN in its features is kept last.
    """

    def ranks(self, scores: Tensor, visual: Tensor, max_tokens: int, vectors: Tensor | None) -> Tensor:
        assert vectors is not None  # `vectors` above always gives some
        finite = visual & ~vectors.isnan().any(-1)
        similarity = rounded_similarity(vectors)
        similarity.add_(similarity.new_zeros(visual.shape).masked_fill_(~finite, -torch.inf)[:, None])
        similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        choose = _choose_in_numpy if for_numpy(vectors) else _choose
        return choose(similarity, finite, visual, max_tokens)


@fused("max_min")
def _choose(similarity: Tensor, finite: Tensor, visual: Tensor, max_tokens: int) -> Tensor:
    """Return the ranks of rows that are worked on together: int64 [R, T].

    Args:
        similarity: float [R, T, T], -inf on the diagonal and in the columns of tokens that are not `finite`.
        finite: bool [R, T], tokens that can be compared.
        visual: bool [R, T], tokens that may be chosen.
        max_tokens: number of tokens of each row to rank.
    """
    nearest = similarity.amax(2)  # the largest similarity is that of the nearest token
    ranks = torch.full(visual.shape, max_tokens, device=visual.device, dtype=torch.int64)
    rows = torch.arange(len(visual), device=visual.device)
    for step in range(max_tokens):
        open_ = nearest.masked_fill(~finite, 2).masked_fill(~visual | (ranks < max_tokens), torch.inf)
        best = open_.argmin(1)
        there = open_[rows, best] < torch.inf
        ranks[rows, best] = torch.where(there, step, ranks[rows, best])
        reach = similarity[rows, best]
        nearest = reach if step == 0 else nearest.maximum(reach)
    return ranks


def _choose_in_numpy(similarity: Tensor, finite: Tensor, visual: Tensor, max_tokens: int) -> Tensor:
    """`_choose` by operations of NumPy, which take a fraction of the time where there is little to do."""
    pairs, known, there = (value.detach().numpy() for value in (similarity, finite, visual))
    rows, tokens = np.arange(len(visual)), visual.shape[1]
    order = np.full((len(visual), max_tokens), tokens)  # of steps for which no token is left: one that is not there
    if pairs.size:
        nearest = np.where(there, np.where(known, pairs.max(2), 2), np.inf)
        for step in range(max_tokens):
            best = order[:, step] = nearest.argmin(1)
            reach = pairs[rows, best]
            if step == 0:
                nearest = np.where(there, np.where(known, reach, 2), np.inf)
            np.maximum(nearest, reach, out=nearest)
            nearest[rows, best] = np.inf
        order[np.arange(max_tokens) >= there.sum(1)[:, None]] = tokens
    ranks = np.full((len(visual), tokens + 1), max_tokens)
    np.put_along_axis(ranks, order, np.arange(max_tokens)[None], 1)
    return torch.from_numpy(ranks[:, :tokens])
