"""Greedy determinantal point processes on the whole kernel, step by step (1709.05135, algorithm 1)."""

import torch
from torch import Tensor

RIDGE = 1e-4


def slow_greedy_ranks(kernel: Tensor, visual: Tensor, max_tokens: int) -> Tensor:
    """Ranks of a greedy DPP with every gain updated at every step: [R, T, T], [R, T] -> int64 [R, T]."""
    rows, size = torch.arange(len(kernel), device=kernel.device), kernel.shape[1]
    kernel = kernel + RIDGE * torch.eye(size, dtype=kernel.dtype, device=kernel.device)
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    factors = kernel.new_zeros(len(kernel), max_tokens, size)
    ranks = torch.full(visual.shape, max_tokens, device=visual.device, dtype=torch.int64)
    for step in range(max_tokens):
        best = gain.masked_fill((ranks < max_tokens) | ~visual, -torch.inf).argmax(1)
        ranks[rows, best] = torch.where(visual[rows, best], ranks[rows, best].clamp(max=step), max_tokens)
        past = (factors[rows, :step, best][:, None] @ factors[:, :step])[:, 0]
        most_taken = (gain - RIDGE).clamp(min=0).sqrt()
        column = (kernel[rows, best] - past) / gain[rows, best].sqrt()[:, None]
        factors[:, step] = column.clamp(-most_taken, most_taken)
        gain = (gain - factors[:, step] ** 2).clamp(min=RIDGE)
    return ranks


def shortfall(kernel: Tensor, order: Tensor) -> float:
    """How far the gain of a token in `order` falls short of the largest gain at its step, relative, at most.

    Args:
        kernel: float64 [T, T].
        order: int64 [k], tokens in the order in which they were chosen.
    """
    kernel = kernel + RIDGE * torch.eye(len(kernel), dtype=kernel.dtype)
    gain, factors, worst = kernel.diagonal().clone(), kernel.new_zeros(len(order), len(kernel)), 0.0
    closed = torch.zeros(len(kernel), dtype=torch.bool)
    for step, token in enumerate(order.tolist()):
        best = float(gain[~closed].max())
        worst = max(worst, (best - float(gain[token])) / best)
        closed[token] = True
        factors[step] = (kernel[token] - factors[:step, token] @ factors[:step]) / gain[token].sqrt()
        gain = (gain - factors[step] ** 2).clamp(min=RIDGE)
    return worst
