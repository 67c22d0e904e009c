"""The most probable set of a determinantal point process (DPP), found greedily, from a kernel or from vectors."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from catp_lightning.methods.precision import without_autocast
from catp_lightning.methods.selectors.fused import fused
from catp_lightning.methods.selectors.lazy import AT_ONCE, SHORT, at_once, grow, one_by_one
from catp_lightning.methods.selectors.similarity import exact_similarity, exact_units
from catp_lightning.utils.on_cpu import for_numpy

RIDGE = 1e-4
"""Added to the kernel's diagonal, so that a choice of more tokens than the kernel's rank is still defined."""

FEW = 4
"""Of rows of at most `SHORT` tokens more than so many are worked on together; on the CPU fewer take less one by one."""


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
    if one_by_one(vectors) and len(vectors) > 1:
        each = zip(vectors.split(1), quality.split(1), visual.split(1), strict=True)
        return torch.cat([determinant_ranks(*row, max_tokens) for row in each])
    if at_once(vectors):
        return greedy_ranks(weighted(exact_similarity(vectors), quality), visual, max_tokens)
    ranks = torch.full(visual.shape, max_tokens, device=visual.device, dtype=torch.int64)
    for row, own in enumerate(visual):
        tokens = own.nonzero()[:, 0]
        if 0 < len(tokens) <= AT_ONCE:
            own_vectors, own_quality = vectors[row, tokens][None], quality[row, tokens][None]
            ranks[row, tokens] = determinant_ranks(own_vectors, own_quality, own[tokens][None], max_tokens)[0]
        elif len(tokens) and max_tokens:
            with without_autocast(vectors):
                steps = min(max_tokens, len(tokens))
                order = grow(_Volume.of(vectors[row, tokens], quality[row, tokens], steps), steps)
            ranks[row, tokens[order]] = torch.arange(len(order), device=ranks.device)
    return ranks


def weighted(similarity: Tensor, quality: Tensor) -> Tensor:
    """DPP kernel diag(q) S diag(q): float [R, T, T], which it overwrites, and [R, T] -> [R, T, T]."""
    return similarity.mul_(quality[:, :, None]).mul_(quality[:, None])


def most_in_a_kernel(dtype: torch.dtype) -> float:
    """Largest quality of a token in a kernel of `dtype`: the kernel holds its square, which is squared once more."""
    return torch.finfo(dtype).max ** 0.25


def exact_dtype(like: Tensor) -> torch.dtype:
    """Dtype of DPP kernels on the device of `like`: float64, and float32 on Apple's GPUs, which have no other.

    Beyond the kernel's rank, at most F, a token's gain is close to 0. In float32 it would be mostly rounding error,
    which would decide the choice.
    """
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
    with without_autocast(kernel):
        chosen, gains, _ = _steps(kernel, kernel.diagonal(dim1=1, dim2=2) + RIDGE, ~visual, max_tokens)
    ranks = torch.full(visual.shape, max_tokens, device=visual.device, dtype=torch.int64)
    if not max_tokens:
        return ranks
    steps = torch.arange(max_tokens, device=visual.device, dtype=torch.int64).expand_as(chosen)
    # Where no token is left a step chooses nothing.
    return ranks.scatter_reduce_(1, chosen, steps.where(gains > -torch.inf, max_tokens), "amin")


def _steps(kernel: Tensor, gain: Tensor, closed: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choose tokens one by one: the algorithm of 1709.05135, a Cholesky factor that grows by one column a step.

    It is called without autocast.

    In exact arithmetic no gain falls below the ridge, and no entry of a column takes more from a gain than its excess
    over the ridge. Both bounds are enforced here: beyond the kernel's rank rounding errors would otherwise grow with
    each step until values are NaN.

    Args:
        kernel: float [R, m, m]; its diagonal is not read.
        gain: float [R, m], gains of the tokens before the first step, at least `RIDGE`; overwritten.
        closed: bool [R, m], tokens that may not be chosen; overwritten.
        steps: number of steps.

    Returns:
        The tokens chosen, int64 [R, steps]; their gains, float [R, steps], -inf where none was left to choose; and the
        columns of the factor, float [R, steps, m].
    """
    factors = kernel.new_empty(len(kernel), steps, kernel.shape[1])
    chosen, gains = gain.new_empty(len(gain), steps, dtype=torch.int64), gain.new_empty(len(gain), steps)
    if kernel.shape[1]:
        if for_numpy(kernel) and (len(kernel) <= FEW or kernel.shape[1] > SHORT):
            for row in zip(kernel, gain, closed, chosen, gains, factors, strict=True):
                _choose_alone(*row)
        else:
            _choose(kernel, gain, closed, chosen, gains, factors)
    return chosen, gains, factors


@fused("determinant", ridge=RIDGE)
def _choose(kernel: Tensor, gain: Tensor, closed: Tensor, chosen: Tensor, gains: Tensor, factors: Tensor) -> None:
    """Fill in what `_steps` returns."""
    rows = torch.arange(len(kernel), device=kernel.device)
    for step in range(chosen.shape[1]):
        value, best = gain.masked_fill(closed, -torch.inf).max(1, keepdim=True)
        chosen[:, step : step + 1], gains[:, step : step + 1] = best, value
        closed.scatter_(1, best, True)
        pivot, column, best = gain.gather(1, best).sqrt_(), kernel[rows, best[:, 0]], best[:, 0]
        column -= (factors[rows, :step, best][:, None] @ factors[:, :step])[:, 0]
        most_taken = (gain - RIDGE).clamp_(min=0).sqrt_()
        column = torch.clamp(column.div_(pivot), -most_taken, most_taken, out=factors[:, step])
        gain.sub_(column.square()).clamp_(min=RIDGE)


def _choose_alone(kernel: Tensor, gain: Tensor, closed: Tensor, chosen: Tensor, gains: Tensor, factors: Tensor) -> None:
    """`_choose` for one row, without the first dimension, by operations of NumPy, which take a fraction of the time.

    The factor has a multiple of 64 columns: where some are left over, a product with a vector may compute them in
    another way, so that equal tokens would differ by rounding.
    """
    tokens, steps = kernel.shape[0], len(chosen)
    pairs, shut, order, values = (value.detach().numpy() for value in (kernel, closed, chosen, gains))
    found, width = factors.numpy(), -(-tokens // 64) * 64
    columns = found if width == tokens else np.zeros((steps, width), pairs.dtype)
    left = gain.detach().numpy()
    open_, most_taken = np.where(shut, -np.inf, left), np.empty_like(left)
    for step in range(steps):
        best = order[step] = open_.argmax()
        values[step], pivot = open_[best], left[best]
        shut[best] = True
        column = columns[step, :tokens]
        np.subtract(pairs[best], (columns[:step, best] @ columns[:step])[:tokens], out=column)
        column /= math.sqrt(pivot)
        np.subtract(left, RIDGE, out=most_taken)
        np.sqrt(np.maximum(most_taken, 0, out=most_taken), out=most_taken)
        np.minimum(column, most_taken, out=column)
        np.maximum(column, np.negative(most_taken, out=most_taken), out=column)
        left -= np.square(column, out=open_)
        np.maximum(left, RIDGE, out=left)
        np.copyto(open_, left)
        open_[shut] = -np.inf
    if columns is not found:
        found[:] = columns[:, :tokens]


@dataclass(eq=False)
class _Volume:
    """Gains of one row's tokens, for `grow`: a `Growing` of n tokens whose kernel is diag(q) U U^T diag(q).

    Token j has the gain q_j^2 rest_j + ridge, with rest_j = 1 - sum over the tokens chosen of (u_j . direction)^2. A
    chosen token's direction is what is left of its vector beyond those chosen before it, so that no similarity of two
    tokens is needed of which neither comes near to being chosen.

    Attributes:
        unit: float [n, F], the vectors u.
        quality: float [n], q.
        directions: float [steps, F], of which the first `count` are known.
        along: float [n, steps], u_j . direction.
        rest: float [n].
        gain: float [n], -inf for tokens that are chosen.
        count: number of tokens that are chosen.
    """

    unit: Tensor
    quality: Tensor
    directions: Tensor
    along: Tensor
    rest: Tensor
    gain: Tensor
    count: int = 0

    @classmethod
    def of(cls, vectors: Tensor, quality: Tensor, steps: int) -> "_Volume":
        """Return the gains of n tokens from vectors [n, F] before any is chosen."""
        unit = exact_units(vectors)
        directions, along = unit.new_empty(steps, unit.shape[1]), unit.new_empty(len(unit), steps)
        return cls(unit, quality, directions, along, torch.ones_like(quality), quality.square() + RIDGE)

    def ahead(self, tokens: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Choose as if there were only `tokens`."""
        unit, along, quality = self.unit[tokens], self.along[tokens, : self.count], self.quality[tokens]
        kernel = weighted((unit @ unit.T).addmm_(along, along.T, alpha=-1)[None], quality[None])
        closed = torch.zeros_like(tokens, dtype=torch.bool)
        chosen, gains, factors = _steps(kernel, self.gain[tokens][None], closed[None], steps)
        self._factors = factors[0].index_select(1, chosen[0]).T.tril_(-1)
        self._factors.diagonal().copy_(gains[0].sqrt())
        return tokens[chosen[0]], gains[0]

    def add(self, tokens: Tensor) -> None:
        """Choose `tokens`, the first of those that `ahead` gave last, and compute all gains anew."""
        few, new = len(tokens), slice(self.count, self.count + len(tokens))
        left = self.unit[tokens].addmm_(self.along[tokens, : self.count], self.directions[: self.count], alpha=-1)
        left *= self.quality[tokens, None]
        found = torch.linalg.solve_triangular(self._factors[:few, :few], left, upper=False).nan_to_num_(0.0, 0.0, 0.0)
        # At most 1 but for rounding, which beyond the rank of a kernel without a ridge is all that there is.
        self.directions[new] = found / found.norm(dim=-1, keepdim=True).clamp_(min=1)
        along = self.directions[new] @ self.unit.T
        self.along[:, new] = along.T
        self.rest = (self.rest - along.square_().sum(0)).clamp_(min=0)
        closed = self.gain == -torch.inf
        self.gain = (self.quality.square() * self.rest + RIDGE).masked_fill_(closed, -torch.inf)
        self.gain[tokens] = -torch.inf
        self.count += len(tokens)
