"""How much may stay for a price: the budget of a schedule whose price is a share of the unpruned model's."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from catp_lightning.methods.schedule import Step, visits
from catp_lightning.pricing.prices import Prices, Prompts, Unit

HALVINGS = 40


def tokens_read(steps: Sequence[Step], tokens: Tensor, depth: int) -> Tensor:
    """Return how many visual tokens each layer reads under a schedule: int64 [N, depth].

    Args:
        steps: the schedule, `policy.steps()`.
        tokens: int64 [N], visual tokens of each sample, of one image.
        depth: number of layers.

    Raises:
        PolicyError: how many stay depends on the prompt.
    """
    different, at = tokens.unique(return_inverse=True)
    counts = [visits(steps, count, depth) if count else (0,) * depth for count in different.tolist()]
    return torch.tensor(counts, dtype=torch.int64, device=tokens.device)[at]


def keep_at(
    prices: Prices, unit: Unit, share: float, prompts: Prompts, counts_of: Callable[[float], Tensor]
) -> float | None:
    """Return the largest budget in (0, 1] under which prompts cost together at most a share of their unpruned price.

    Args:
        prices: prices of the model.
        unit: what is paid.
        share: the share.
        prompts: the prompts.
        counts_of: returns, for a budget, how many visual tokens each layer reads: int64 [N, depth]; a larger budget
            leaves no fewer.

    Returns:
        The budget, with as few decimals as it may have; None if no budget is cheap enough.

    Raises:
        PruningError: the unit is not known for this model.
    """
    full = prices.price(unit, prompts).sum().item()
    return largest(lambda keep: prices.price(unit, prompts, counts_of(keep)).sum().item(), share * full)


def largest(cost: Callable[[float], float], limit: float) -> float | None:
    """Return the largest number in (0, 1] whose cost is at most a limit; None if there is none.

    Args:
        cost: a function that does not decrease.
        limit: the limit.

    Returns:
        Of the numbers that cost as much, one with as few decimals as possible.

    >>> largest(lambda keep: round(96 * keep), 24), largest(lambda keep: 9, 8)
    (0.25, None)
    """
    limit += 1e-12 * abs(limit)  # a share of the full price, rounded
    below, above = 0.5**HALVINGS, 1.0
    if cost(above) <= limit:
        return above
    if cost(below) > limit:
        return None
    for _ in range(HALVINGS):
        middle = (below + above) / 2
        if cost(middle) <= limit:
            below = middle
        else:
            above = middle
    for decimals in range(1, 10):
        short = int(below * 10**decimals) / 10**decimals
        if short > 0 and cost(short) == cost(below):
            return short
    return below
