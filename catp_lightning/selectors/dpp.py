"""Relevance with diversity: the most probable set of a determinantal point process, found greedily."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from catp_lightning.observation import Needs, Observation, Signal
from catp_lightning.scorers.cross_attention import standardise
from catp_lightning.selectors.base import Selector, without_autocast

RIDGE = 1e-4
"""Added to the diagonal: with more tokens than the kernel's rank the choice is still defined."""


@dataclass(frozen=True)
class DPP(Selector):
    """Greedy MAP of a k-DPP with kernel diag(q) S diag(q), q = exp(relevance * standardised score / 2).

    The kernel of CDPruner (2506.10967, section 3.3) with a strength, as 1709.05135 solves it. S is the cosine
    similarity of the tokens' cross-attention maps, or of the tokens themselves: two query tokens that look at the
    same patches are worth one. Under "regions" patches count by the attention they receive in the vision tower's last
    block: S is the cosine of the inner product weighted by it.

    Attributes:
        relevance: how much the scores count beside diversity; 0 is diversity alone, negative turns the scores round.
        similarity: what tokens are compared by.
        layers: the cross-attention layers whose maps are compared, counted from 0; None: all. Heads are kept apart.
    """

    relevance: float = 1.0
    similarity: Literal["cross-attention", "regions", "outputs"] = "cross-attention"
    layers: tuple[int, ...] | None = None

    @property
    def needs(self) -> Needs:
        if self.similarity == "outputs":
            return {Signal.IMAGE_FEATURES: None}
        weight: Needs = {Signal.VISION_ATTENTION_RECEIVED: None} if self.similarity == "regions" else {}
        return {Signal.CROSS_ATTENTION: self.layers, **weight}

    def vectors(self, seen: Observation) -> Tensor:
        if self.similarity == "outputs":
            return seen[Signal.IMAGE_FEATURES]
        maps = seen.by_layer(Signal.CROSS_ATTENTION, self.layers)
        if self.similarity == "regions":
            maps = maps * seen[Signal.VISION_ATTENTION_RECEIVED].sqrt()[:, None, None, None]
        return maps.flatten(1, 2).transpose(1, 2).flatten(2)

    def ranks(self, scores: Tensor, visual: Tensor, most: int, vectors: Tensor | None) -> Tensor:
        assert vectors is not None  # `vectors` above always gives some
        return greedy_ranks(self.kernel(scores, visual, exact_similarity(vectors)), visual, most)

    def kernel(self, scores: Tensor, visual: Tensor, similarity: Tensor) -> Tensor:
        """diag(q) S diag(q): float [R, T], bool [R, T], float [R, T, T] -> float [R, T, T]."""
        scores = torch.where(scores.isfinite(), scores, 0).to(similarity.dtype)
        largest = most_in_a_kernel(similarity.dtype)  # beyond, squares would not be finite
        scores = scores / (scores.abs().amax(1, keepdim=True) / largest).clamp(min=1)
        relevance = torch.zeros_like(scores)
        for count in visual.sum(1).unique().tolist():  # a row's own tokens are standardised among themselves
            own = visual & (visual.sum(1) == count)[:, None]
            relevance[own] = standardise(scores[own].view(-1, max(count, 1))).flatten()
        strength = max(-1e30, min(1e30, self.relevance))
        logarithm = strength * relevance / 2
        beyond = (logarithm.amax(1, keepdim=True) - math.log(largest)).clamp(min=0)
        quality = torch.exp(logarithm - beyond)
        return similarity * quality[:, :, None] * quality[:, None]


def most_in_a_kernel(dtype: torch.dtype) -> float:
    """The largest quality of a token: a kernel has its square, and that is squared again."""
    return torch.finfo(dtype).max ** 0.25


def exact_similarity(vectors: Tensor) -> Tensor:
    """`cosine_similarity` for kernels, float64 [R, T, T]; on Apple's GPUs, which have no float64, float32.

    What a token adds beyond the kernel's rank, at most the features' dimension, is next to nothing. In float32 it would
    be rounding, and what differs by batch and device would choose.
    """
    return cosine_similarity(vectors, torch.float32 if vectors.device.type == "mps" else torch.float64)


def cosine_similarity(vectors: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of all pairs of tokens, in `dtype` at least: [R, T, F] -> [R, T, T]."""
    vectors = F.normalize(vectors.to(torch.promote_types(vectors.dtype, dtype)), dim=-1)
    with without_autocast(vectors):
        similarity = torch.nan_to_num(vectors @ vectors.transpose(1, 2))
    similarity.diagonal(dim1=1, dim2=2).fill_(1)  # exactly: or rounding, which differs by batch, breaks ties
    return similarity


def greedy_ranks(kernel: Tensor, visual: Tensor, most: int) -> Tensor:
    """Greedy maximum a posteriori set of a k-DPP: each step adds the token with the largest gain in log-determinant.

    Args:
        kernel: float [R, T, T], symmetric, positive semi-definite, finite.
        visual: bool [R, T], tokens that may be chosen.
        most: number of steps.

    Returns:
        int64 [R, T], the step at which a token is added; `most` where it is not. Of equal gains the lowest index wins.

    1709.05135, algorithm 1: a Cholesky factor grown by one column a step, O(T k) a step. In exact arithmetic no gain is
    less than the ridge, and no entry of a column takes more than what is above it. Rounding knows no such bounds:
    beyond the kernel's rank its errors would grow with each step until nothing is a number any more.
    """
    rows, size = torch.arange(len(kernel), device=kernel.device), kernel.shape[1]
    kernel = kernel + RIDGE * torch.eye(size, dtype=kernel.dtype, device=kernel.device)
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    factors = kernel.new_zeros(len(kernel), most, size)
    ranks = torch.full(visual.shape, most, device=visual.device, dtype=torch.int64)
    for step in range(most):
        best = gain.masked_fill((ranks < most) | ~visual, -torch.inf).argmax(1)
        ranks[rows, best] = torch.where(visual[rows, best], ranks[rows, best].clamp(max=step), most)
        with without_autocast(kernel):
            past = (factors[rows, :step, best][:, None] @ factors[:, :step])[:, 0]
        most_taken = (gain - RIDGE).clamp(min=0).sqrt()
        column = (kernel[rows, best] - past) / gain[rows, best].sqrt()[:, None]
        factors[:, step] = column.clamp(-most_taken, most_taken)
        gain = (gain - factors[:, step] ** 2).clamp(min=RIDGE)
    return ranks
