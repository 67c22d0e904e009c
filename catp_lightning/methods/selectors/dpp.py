"""Relevance and diversity: the most probable set of a determinantal point process (DPP), found greedily."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.precision import without_autocast
from catp_lightning.methods.scorers.cross_attention import standardise
from catp_lightning.methods.selectors.base import Selector

RIDGE = 1e-4
"""Added to the kernel's diagonal, so that a choice of more tokens than the kernel's rank is still defined."""


@dataclass(frozen=True)
class DPP(Selector):
    """Greedy MAP of a k-DPP with kernel diag(q) S diag(q), q = exp(relevance * standardised score / 2).

    The kernel of CDPruner (2506.10967, section 3.3) with a strength added, solved by the algorithm of 1709.05135. S is
    the cosine similarity of the tokens' cross-attention maps, or of the tokens themselves: of two query tokens that
    attend to the same patches, one is enough.

    Attributes:
        relevance: weight of the scores beside diversity; 0 is diversity alone, a negative value reverses the scores.
        similarity: signal by which tokens are compared: "cross-attention" maps; "regions", the same maps, with the
            inner product weighted by the attention that patches receive in the vision tower's last block; or
            "outputs", the tokens as they leave the vision part.
        layers: the cross-attention layers whose maps are compared, counted from 0; None: all. Heads are kept apart.
    """

    compares: ClassVar[bool] = True

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

    def ranks(self, scores: Tensor, visual: Tensor, max_tokens: int, vectors: Tensor | None) -> Tensor:
        assert vectors is not None  # `vectors` above always gives some
        return greedy_ranks(self.kernel(scores, visual, exact_similarity(vectors)), visual, max_tokens)

    def kernel(self, scores: Tensor, visual: Tensor, similarity: Tensor) -> Tensor:
        """DPP kernel diag(q) S diag(q) from scores [R, T], mask [R, T] and similarity S [R, T, T]: float [R, T, T]."""
        scores = torch.where(scores.isfinite(), scores, 0).to(similarity.dtype)
        largest = most_in_a_kernel(similarity.dtype)  # squares of larger values would not be finite
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
    """Largest quality of a token in a kernel of `dtype`: the kernel holds its square, which is squared once more."""
    return torch.finfo(dtype).max ** 0.25


def exact_similarity(vectors: Tensor) -> Tensor:
    """Cosine similarity of all pairs of tokens, for DPP kernels: float [R, T, F] -> float64 [R, T, T].

    Beyond the kernel's rank, at most F, a token's gain is close to 0. In float32 it would be mostly rounding error,
    which differs by batch and device and would decide the choice. On Apple's GPUs, which have no float64, the result is
    float32.
    """
    return cosine_similarity(vectors, torch.float32 if vectors.device.type == "mps" else torch.float64)


def cosine_similarity(vectors: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Cosine similarity of all pairs of tokens, in `dtype` at least: [R, T, F] -> [R, T, T]; NaN becomes 0."""
    vectors = F.normalize(vectors.to(torch.promote_types(vectors.dtype, dtype)), dim=-1)
    with without_autocast(vectors):
        similarity = torch.nan_to_num(vectors @ vectors.transpose(1, 2))
    similarity.diagonal(dim1=1, dim2=2).fill_(1)  # exactly 1: rounding, which differs by batch, would break ties
    return similarity


def greedy_ranks(kernel: Tensor, visual: Tensor, max_tokens: int) -> Tensor:
    """Greedy maximum a posteriori (MAP) set of a k-DPP: each step adds the token with the largest log-determinant gain.

    Args:
        kernel: float [R, T, T], symmetric, positive semi-definite, finite.
        visual: bool [R, T], True for tokens that may be chosen.
        max_tokens: number of steps.

    Returns:
        int64 [R, T], the step at which a token is added; `max_tokens` if it is not added. Where gains are equal the
        lowest index wins.

    1709.05135, algorithm 1: a Cholesky factor that grows by one column a step, at a cost of O(T k) a step. In exact
    arithmetic no gain falls below the ridge, and no entry of a column takes more from a gain than its excess over the
    ridge. Both bounds are enforced here: beyond the kernel's rank rounding errors would otherwise grow with each step
    until values are NaN.
    """
    rows, size = torch.arange(len(kernel), device=kernel.device), kernel.shape[1]
    kernel = kernel + RIDGE * torch.eye(size, dtype=kernel.dtype, device=kernel.device)
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    factors = kernel.new_zeros(len(kernel), max_tokens, size)
    ranks = torch.full(visual.shape, max_tokens, device=visual.device, dtype=torch.int64)
    for step in range(max_tokens):
        best = gain.masked_fill((ranks < max_tokens) | ~visual, -torch.inf).argmax(1)
        ranks[rows, best] = torch.where(visual[rows, best], ranks[rows, best].clamp(max=step), max_tokens)
        with without_autocast(kernel):
            past = (factors[rows, :step, best][:, None] @ factors[:, :step])[:, 0]
        most_taken = (gain - RIDGE).clamp(min=0).sqrt()
        column = (kernel[rows, best] - past) / gain[rows, best].sqrt()[:, None]
        factors[:, step] = column.clamp(-most_taken, most_taken)
        gain = (gain - factors[:, step] ** 2).clamp(min=RIDGE)
    return ranks
