"""Number of tokens that a budget keeps."""

import math

from torch import Tensor

from catp_lightning.utils.on_cpu import on_cpu, on_device_of


def keep_count(keep: int | float, tokens: int) -> int:
    """Return how many of `tokens` a budget keeps: a share is rounded up; at least 1, at most all.

    >>> keep_count(0.25, 32), keep_count(0.1, 30), keep_count(100, 32), keep_count(0.001, 32)
    (8, 3, 32, 1)
    """
    wanted = keep if isinstance(keep, int) else math.ceil(keep * tokens - 1e-9)  # 0.07 * 100 is 7.000000000000001
    return min(tokens, max(1, wanted))


def multiplied(counts: Tensor, factors: Tensor, tokens: Tensor) -> Tensor:
    """Return multiples of `counts`, rounded to the nearest, at least 1 and at most `tokens`: int64 [R].

    Args:
        counts: int64 [R], numbers of tokens.
        factors: float [R], what each is multiplied by.
        tokens: int64 [R], number of tokens that there are.

    >>> import torch
    >>> multiplied(torch.tensor([8, 8, 8]), torch.tensor([0.25, 1.4, 9.0]), torch.tensor([32, 32, 32]))
    tensor([ 2, 11, 32])
    """
    wanted = (counts * factors + 0.5).floor().long()
    return wanted.clamp(min=1).minimum(tokens)


def even_counts(keep: int | float, tokens: Tensor, part: float) -> Tensor:
    """Return how many of each sample's `tokens`, int64 [B], stay after `part` of the stages, a share from 0 to 1.

    Every stage drops as large a share.

    >>> import torch
    >>> even_counts(0.125, torch.tensor([64]), 1 / 3), even_counts(8, torch.tensor([64]), 1.0)
    (tensor([32]), tensor([8]))
    """
    sizes = on_cpu(tokens)[0].tolist()
    last = [keep_count(keep, count) / max(1, count) for count in sizes]
    counts = [keep_count(share**part, count) for share, count in zip(last, sizes, strict=True)]
    return on_device_of(tokens, counts)
