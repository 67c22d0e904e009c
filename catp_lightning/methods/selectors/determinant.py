"""The most probable set of a determinantal point process (DPP), found greedily, from a kernel or from vectors."""

import torch
from torch import Tensor

from catp_lightning.methods.precision import without_autocast
from catp_lightning.methods.selectors.lazy import AT_ONCE, at_once, grow
from catp_lightning.methods.selectors.similarity import cosine_similarity, unit_vectors

RIDGE = 1e-4
"""Added to the kernel's diagonal, so that a choice of more tokens than the kernel's rank is still defined."""


def determinant_ranks(vectors: Tensor, quality: Tensor, visual: Tensor, max_tokens: int) -> Tensor:
    """Ranks of `greedy_ranks` for the kernel diag(q) S diag(q), S the cosine similarity of the tokens.

    Where all rows are compared at once the kernel is computed. Of longer rows only similarities to tokens that are
    chosen, or nearly, are; the choice is the same but for rounding, where two gains are as good as equal.

    Args:
        vectors: float [R, T, F].
        quality: float [R, T], at least 0, of the dtype that `exact_similarity` gives.
        visual: bool [R, T], True for tokens that may be chosen.
        max_tokens: number of steps.

    Returns:
        int64 [R, T], as `greedy_ranks`.
    """
    if at_once(vectors):
        kernel = weighted(exact_similarity(vectors), quality)
        return greedy_ranks(kernel, visual, max_tokens)
    ranks = torch.full(visual.shape, max_tokens, device=visual.device, dtype=torch.int64)
    for row, own in enumerate(visual):
        tokens = own.nonzero()[:, 0]
        if 0 < len(tokens) <= AT_ONCE:
            own_vectors, own_quality = vectors[row, tokens][None], quality[row, tokens][None]
            ranks[row, tokens] = determinant_ranks(own_vectors, own_quality, own[tokens][None], max_tokens)[0]
        elif len(tokens):
            with without_autocast(vectors):
                order = grow(_Volume(vectors[row, tokens], quality[row, tokens], min(max_tokens, len(tokens))))
            ranks[row, tokens[order]] = torch.arange(len(order), device=ranks.device)
    return ranks


def weighted(similarity: Tensor, quality: Tensor) -> Tensor:
    """DPP kernel diag(q) S diag(q): float [R, T, T] and [R, T] -> [R, T, T]."""
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
    return cosine_similarity(vectors, exact_dtype(vectors))


def exact_dtype(like: Tensor) -> torch.dtype:
    """Dtype of DPP kernels on the device of `like`: float64, and float32 on Apple's GPUs."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def greedy_ranks(kernel: Tensor, visual: Tensor, max_tokens: int) -> Tensor:
    """Greedy maximum a posteriori (MAP) set of a k-DPP: each step adds the token with the largest log-determinant gain.

    Args:
        kernel: float [R, T, T], symmetric, positive semi-definite, finite.
        visual: bool [R, T], True for tokens that may be chosen.
        max_tokens: number of steps.

    Returns:
        int64 [R, T], the step at which a token is added; `max_tokens` if it is not added. Where gains are equal the
        lowest index wins.
    """
    kernel = kernel.clone()
    kernel.diagonal(dim1=1, dim2=2).add_(RIDGE)
    with without_autocast(kernel):
        chosen, gains, _ = _steps(kernel, kernel.diagonal(dim1=1, dim2=2).clone(), ~visual, max_tokens)
    ranks = torch.full(visual.shape, max_tokens, device=visual.device, dtype=torch.int64)
    if not max_tokens:
        return ranks
    steps = torch.arange(max_tokens, device=visual.device, dtype=torch.int64).expand_as(chosen)
    # Where no token is left a step chooses nothing.
    return ranks.scatter_reduce(1, chosen, steps.where(gains > -torch.inf, max_tokens), "amin")


def _steps(kernel: Tensor, gain: Tensor, closed: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choose tokens one by one: the algorithm of 1709.05135, a Cholesky factor that grows by one column a step.

    It is called without autocast.

    In exact arithmetic no gain falls below the ridge, and no entry of a column takes more from a gain than its excess
    over the ridge. Both bounds are enforced here: beyond the kernel's rank rounding errors would otherwise grow with
    each step until values are NaN.

    Args:
        kernel: float [R, m, m].
        gain: float [R, m], gains of the tokens before the first step, at least `RIDGE`; overwritten.
        closed: bool [R, m], tokens that may not be chosen; overwritten.
        steps: number of steps.

    Returns:
        The tokens chosen, int64 [R, steps]; their gains, float [R, steps], -inf where none was left to choose; and the
        columns of the factor, float [R, steps, m].
    """
    rows = torch.arange(len(kernel), device=kernel.device)
    factors = kernel.new_empty(len(kernel), steps, kernel.shape[1])
    chosen, gains = gain.new_empty(len(gain), steps, dtype=torch.int64), gain.new_empty(len(gain), steps)
    if not kernel.shape[1]:
        return chosen, gains, factors
    for step in range(steps):
        value, best = gain.masked_fill(closed, -torch.inf).max(1, keepdim=True)
        chosen[:, step : step + 1], gains[:, step : step + 1] = best, value
        closed.scatter_(1, best, True)
        pivot, column, best = gain.gather(1, best).sqrt_(), kernel[rows, best[:, 0]], best[:, 0]
        column -= (factors[rows, :step, best][:, None] @ factors[:, :step])[:, 0]
        most_taken = (gain - RIDGE).clamp_(min=0).sqrt_()
        column = torch.clamp(column.div_(pivot), -most_taken, most_taken, out=factors[:, step])
        gain.sub_(column.square()).clamp_(min=RIDGE)
    return chosen, gains, factors


class _Volume:
    """Gains of one row's tokens, for `grow`: a `Growing` of n tokens whose kernel is diag(q) U U^T diag(q).

    Token j has the gain q_j^2 rest_j + ridge, with rest_j = 1 - sum over the tokens chosen of (u_j . direction)^2. A
    chosen token's direction is what is left of its vector beyond those chosen before it, so that no similarity of two
    tokens is needed of which neither comes near to being chosen.
    """

    def __init__(self, vectors: Tensor, quality: Tensor, steps: int) -> None:
        unit = unit_vectors(vectors, exact_dtype(vectors))
        self.unit = unit.masked_fill(~unit.isfinite().all(-1, keepdim=True), 0)  # similar to no other token
        self.quality, self.rest = quality, torch.ones_like(quality)
        self.bound = quality.square() + RIDGE
        self.steps = steps
        self.known = torch.zeros_like(quality, dtype=torch.int64)
        self.directions = unit.new_empty(steps, unit.shape[1])
        self.along = unit.new_empty(len(unit), steps)  # rows of tokens that are never looked at take no memory
        self.count = 0

    def refresh(self, tokens: Tensor) -> None:
        """Compute the gains of `tokens`, int64 [m]."""
        known = self.known[tokens]
        for first in known.unique().tolist():
            own = tokens[known == first]
            along = self.directions[first : self.count] @ self.unit[own].T  # [steps, tokens]
            self.along[own, first : self.count] = along.T
            self.rest[own] = (self.rest[own] - along.square_().sum(0)).clamp_(min=0)
        self.known[tokens] = self.count
        self.bound[tokens] = self.quality[tokens].square() * self.rest[tokens] + RIDGE

    def ahead(self, tokens: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Choose as if there were only `tokens`."""
        unit, along, quality = self.unit[tokens], self.along[tokens, : self.count], self.quality[tokens]
        kernel = weighted((unit @ unit.T).addmm_(along, along.T, alpha=-1)[None], quality[None])
        closed = torch.zeros_like(quality, dtype=torch.bool)
        chosen, gains, factors = _steps(kernel, self.bound[tokens][None], closed[None], steps)
        self._factors = factors[0].index_select(1, chosen[0]).T.tril_(-1)
        self._factors.diagonal().copy_(gains[0].sqrt())
        return tokens[chosen[0]], gains[0]

    def add(self, tokens: Tensor) -> None:
        """Choose `tokens`, the first of those that `ahead` gave last."""
        after = self.count + len(tokens)
        left = self.unit[tokens].addmm_(self.along[tokens, : self.count], self.directions[: self.count], alpha=-1)
        left *= self.quality[tokens, None]
        factors = self._factors[: len(tokens), : len(tokens)]
        found = torch.linalg.solve_triangular(factors, left, upper=False).nan_to_num_(0.0, 0.0, 0.0)
        # At most 1 but for rounding, which beyond the rank of a kernel without a ridge is all that there is.
        self.directions[self.count : after] = found / found.norm(dim=-1, keepdim=True).clamp_(min=1)
        self.bound[tokens] = -torch.inf
        self.count = after
