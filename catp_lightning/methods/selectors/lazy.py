"""Greedy choices in which a token's gain never rises: only tokens that may be next are looked at."""

from typing import Protocol

import torch
from torch import Tensor

AT_ONCE = 1024
"""Rows of at most so many tokens are compared all with all, in one matrix; of longer rows a part at a time."""


def at_once(vectors: Tensor) -> bool:
    """True if rows of tokens, [R, T, F], are compared all with all, and all rows together.

    Elsewhere than on the CPU they always are: parts depend on values, for which a GPU would be waited.
    """
    return vectors.shape[1] <= AT_ONCE or vectors.device.type != "cpu"


class Growing(Protocol):
    """A set that grows, of n tokens, by the token that gains most; a gain never rises while the set grows.

    Attributes:
        bound: float [n], a token's gain when it was last computed; -inf for tokens that are chosen.
        known: int64 [n], number of tokens that had been chosen then.
        steps: number of tokens to choose, at most n.
    """

    bound: Tensor
    known: Tensor
    steps: int

    def refresh(self, tokens: Tensor) -> None:
        """Compute the gains of `tokens`, int64 [m]: `bound` and `known`."""

    def ahead(self, tokens: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Choose as if there were only `tokens`, int64 [m] ascending: tokens and gains when chosen, [steps] each."""

    def add(self, tokens: Tensor) -> None:
        """Choose `tokens`, int64 [m], the first of those that `ahead` gave last; their bound becomes -inf."""


def grow(growing: Growing) -> Tensor:
    """Tokens in the order in which they are chosen: int64 [steps]. Where gains are equal the lowest index wins.

    The tokens with the largest bounds are chosen from as if there were no others, for as long as what they gain exceeds
    the largest bound of the others, which is at least what these would gain.
    """
    order: list[Tensor] = []
    count, ahead = 0, 8
    while count < growing.steps:
        tokens, beyond, first = _largest(growing.bound, 6 * ahead)
        if bool((growing.known[tokens] < count).any()):
            several, _, _ = _largest(growing.bound, max(512, 12 * ahead))
            growing.refresh(several[growing.known[several] < count])
            continue
        chosen, gains = growing.ahead(tokens, min(ahead, growing.steps - count, len(tokens)))
        sure = (gains > beyond) | ((gains == beyond) & (chosen < first))
        found = chosen[: int(sure.long().cumprod(0).sum())]  # at least one
        growing.add(found)
        order.append(found)
        count += len(found)
        ahead = min(32, 2 * ahead) if len(found) == len(chosen) else max(8, len(found) + len(found) // 4)
    return torch.cat(order) if order else growing.known[:0]


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
