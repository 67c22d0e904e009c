"""Relevance with diversity: the most probable set of a determinantal point process, found greedily."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from catp_lightning.observation import Needs, Observation, Signal
from catp_lightning.scorers.cross_attention import standardise
from catp_lightning.selectors.base import Selector


@dataclass(frozen=True)
class DPP(Selector):
    """Greedy MAP of a k-DPP with kernel diag(q) S diag(q), q = exp(relevance * standardised score / 2).

    The kernel of CDPruner (2506.10967, section 3.3) with a strength, as 1709.05135 solves it. S is the cosine
    similarity of the tokens' cross-attention maps, or of the tokens themselves: two query tokens that look at the
    same patches are worth one.

    Attributes:
        relevance: how much the scores count beside diversity; 0 is diversity alone, negative turns the scores round.
        similarity: what tokens are compared by.
        layers: the cross-attention layers whose maps are compared, counted from 0; None: all. Heads are kept apart.
    """

    relevance: float = 1.0
    similarity: Literal["cross-attention", "outputs"] = "cross-attention"
    layers: tuple[int, ...] | None = None

    @property
    def needs(self) -> Needs:
        if self.similarity == "outputs":
            return {Signal.OUTPUTS: None}
        return {Signal.CROSS_ATTENTION: self.layers}

    def vectors(self, seen: Observation) -> Tensor:
        if self.similarity == "outputs":
            return seen[Signal.OUTPUTS]
        return seen.by_layer(Signal.CROSS_ATTENTION, self.layers).flatten(1, 2).transpose(1, 2).flatten(2)

    def select(self, scores: Tensor, visual: Tensor, counts: Tensor, vectors: Tensor | None) -> Tensor:
        assert vectors is not None  # `vectors` above always gives some
        vectors = F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)
        scores = torch.where(scores.isfinite(), scores, 0).to(vectors.dtype)
        relevance = torch.zeros_like(scores)
        for count in visual.sum(1).unique().tolist():  # a row's own tokens are standardised among themselves
            rows = visual.sum(1) == count
            relevance[rows, :count] = standardise(scores[rows, :count])
        quality = torch.exp(self.relevance * relevance / 2)
        similarity = torch.nan_to_num(vectors @ vectors.transpose(1, 2))
        similarity.diagonal(dim1=1, dim2=2).fill_(1)  # exactly: or rounding, which differs by batch, breaks ties
        return greedy_map(similarity * quality[:, :, None] * quality[:, None], visual, counts)


def greedy_map(kernel: Tensor, visual: Tensor, counts: Tensor) -> Tensor:
    """Greedy maximum a posteriori set of a k-DPP: each step adds the token with the largest gain in log-determinant.

    Args:
        kernel: float [R, T, T], symmetric, positive semi-definite.
        visual: bool [R, T], tokens that may be chosen.
        counts: int64 [R], tokens to choose in each row.

    Returns:
        bool [R, T]. Of equal gains the lowest index wins.

    1709.05135, algorithm 1: a Cholesky factor grown by one column a step, O(T k) a step.
    """
    rows, size = torch.arange(len(kernel), device=kernel.device), kernel.shape[1]
    most = int(counts.max())
    kernel = kernel + 1e-4 * torch.eye(
        size, dtype=kernel.dtype, device=kernel.device
    )  # more tokens than rank: still defined
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    factors = kernel.new_zeros(len(kernel), most, size)
    keep = torch.zeros_like(visual)
    for step in range(most):
        best = gain.masked_fill(keep | ~visual, -torch.inf).argmax(1)
        keep[rows, best] |= step < counts
        past = (factors[rows, :step, best][:, None] @ factors[:, :step])[:, 0]
        factors[:, step] = (kernel[rows, best] - past) / gain[rows, best].clamp(min=1e-8).sqrt()[:, None]
        gain = gain - factors[:, step] ** 2
    return keep
