"""Which rows of tokens are compared all with all, or one by one; greedy choices from the few tokens that gain most."""

from typing import Protocol

import torch
from torch import Tensor

from catp_lightning.utils.on_cpu import for_numpy

AT_ONCE = 1024
"""Rows of at most so many tokens are compared all with all, in one matrix; of longer rows a part at a time."""


def at_once(vectors: Tensor) -> bool:
    """True if tokens of a row, [R, T, F], are compared all with all.

    Elsewhere than on the CPU they always are: parts depend on values, for which a GPU would be waited.
    """
    return vectors.shape[1] <= AT_ONCE or vectors.device.type != "cpu"


SHORT = 64
"""Rows of at most so many tokens are worked on together."""


def one_by_one(vectors: Tensor) -> bool:
    """True if rows of tokens, [R, T, F], are worked on one by one: on the CPU, each in the memory of the last."""
    return for_numpy(vectors) and vectors.shape[1] > SHORT


class Growing(Protocol):
    """A set that grows, of n tokens, by the token that gains most; a gain never rises while the set grows.

    Attributes:
        gain: float [n], each token's gain; -inf for tokens that are chosen.
    """

    gain: Tensor

    def ahead(self, tokens: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Choose as if there were only `tokens`, int64 [m] ascending: tokens and gains when chosen, [steps] each."""

    def add(self, tokens: Tensor) -> None:
        """Choose `tokens`, int64 [m], the first of those that `ahead` gave last, and compute all gains anew."""


def grow(growing: Growing, steps: int) -> Tensor:
    """Return the first `steps` tokens, from 1 to n, in the order in which they are chosen: int64 [steps].

    The tokens that gain most are chosen from as if there were no others, for as long as what they gain exceeds the
    largest gain of the others, which only falls. Where gains are equal the lowest index wins.
    """
    order: list[Tensor] = []
    count, ahead = 0, 16
    while count < steps:
        tokens, beyond, first = _largest(growing.gain, max(128, 4 * ahead))
        chosen, gains = growing.ahead(tokens, min(ahead, steps - count, len(tokens)))
        sure = (gains > beyond) | ((gains == beyond) & (chosen < first))
        found = chosen[: int(sure.long().cumprod(0).sum())]  # at least one
        growing.add(found)
        order.append(found)
        count += len(found)
        ahead = min(64, 2 * ahead) if len(found) == len(chosen) else max(8, len(found) + len(found) // 4)
    return torch.cat(order)


def _largest(bound: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens with the `count` largest bounds, of equal ones the lowest indices, in ascending order.

    With them the largest bound of all others, -inf if there are none, and the lowest index that has it.
    """
    if count >= len(bound):
        return (
            (bound > -torch.inf).nonzero()[:, 0],
            bound.new_tensor(-torch.inf),
            torch.zeros_like(bound[:1], dtype=torch.int64)[0],
        )
    beyond = bound.topk(count + 1).values[-1]
    equal = (bound == beyond).nonzero()[:, 0]
    larger = (bound > beyond).nonzero()[:, 0]
    more = equal[: count - len(larger)] if bool(beyond > -torch.inf) else equal[:0]
    left = equal[len(more) : len(more) + 1]
    return torch.cat([larger, more]).sort().values, beyond, left[0]
