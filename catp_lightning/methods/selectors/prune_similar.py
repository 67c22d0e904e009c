"""Keeps the most relevant tokens, and of the others those that are unlike each other (VisPruner, 2412.01818v2)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from catp_lightning.methods.selection import Selection
from catp_lightning.methods.selectors.base import FeatureSelector, ordered
from catp_lightning.methods.selectors.fused import fused
from catp_lightning.methods.selectors.lazy import at_once
from catp_lightning.methods.selectors.nearest import AllPairs, Array, Nearest, Neighbours
from catp_lightning.methods.selectors.similarity import rounded_similarity
from catp_lightning.utils.on_cpu import for_numpy, on_cpu, on_device, with_copy

AT_A_TIME = 8
"""Number of tokens that a round drops at most, as in the authors' code."""


@dataclass(frozen=True)
class PruneSimilar(FeatureSelector):
    """Keeps the highest scores for a share of the budget, and for the rest the tokens least similar to each other.

    The other tokens, highest score first, are dealt to two sides in turn. Of the first side the tokens most similar to
    their nearest on the second side (cosine of the tokens as they leave the vision part) are dropped, 8 at a time. The
    rest of the first side, most similar first, and then the second side are dealt again, until the budget is met. Of
    tokens of equal similarity the one that came first stays. A round never drops more than needed, nor more than half
    of the tokens left; in that case, and for an odd number of tokens left, the authors' code fails. It rounds the share
    down as here, but to 0 at a budget of 1. Tokens with NaN in their features are kept only if the budget exceeds the
    number of all others.

    Attributes:
        important: share of the budget that goes to the highest scores, from 0 to 1; at least one token unless it is 0.
    """

    nested: ClassVar[bool] = False

    important: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.important <= 1:
            raise ValueError(f"important is {self.important}; it is a share of the budget, from 0 to 1.")

    def select(self, scores: Tensor, visual: Tensor, counts: Tensor, vectors: Tensor | None) -> Selection:
        assert vectors is not None  # `vectors` above always gives some
        finite = visual & ~vectors.isnan().any(-1)
        order = ordered(scores, visual)
        last = (~finite).gather(1, order).byte()
        order = order.gather(1, last.argsort(dim=1, stable=True))  # finite ones, NaN, what is not there
        own, asked = on_cpu(visual, counts)
        important = torch.tensor([self._important(count) for count in asked.tolist()], device="cpu", dtype=torch.int64)
        others = asked - important
        if not for_numpy(vectors):
            parts = on_device(torch.stack([important, others, own.sum(1)]), visual.device)
            return Selection(_together(rounded_similarity(vectors), order, finite.sum(1), parts))
        keep = torch.zeros_like(visual)
        dealt = finite.sum(1).maximum(asked).tolist()
        for row, (top, target) in enumerate(zip(important.tolist(), others.tolist(), strict=True)):
            keep[row, order[row, :top]] = True
            if target:
                nearest = AllPairs(vectors[row]) if at_once(vectors) else Neighbours(vectors[row])
                left = _dealt_alone(order[row, top : dealt[row]].numpy(), target, nearest)
                keep[row, torch.from_numpy(left)] = True
        return Selection(keep)

    def _important(self, count: int) -> int:
        """Number of tokens with the highest scores in a budget of `count` tokens."""
        return min(count, max(int(count * self.important), int(self.important > 0)))


def _dealt_alone(left: Array, target: int, nearest: Nearest) -> Array:
    """Deal the tokens of a row to two sides and drop those of the first that are like the second, until few are left.

    Args:
        left: int64 [N], tokens in the order in which they are dealt.
        target: number of tokens that shall be left, at most N.
        nearest: similarity of tokens to the nearest of others.

    Returns:
        The tokens that are left, int64 [target].
    """
    while len(left) > target:
        first, second = left[::2], left[1::2]
        stay = len(first) - min(AT_A_TIME, len(left) - target, len(second))
        order = nearest(first, second).argsort(kind="stable")
        left = np.concatenate([first[order[:stay]][::-1], second])
    return left


@fused("prune_similar", at_a_time=AT_A_TIME)
def _together(similarity: Tensor, order: Tensor, finite: Tensor, parts: Tensor) -> Tensor:
    """Return the tokens of all rows that stay, bool [R, T].

    Args:
        similarity: float [R, T, T], of all pairs.
        order: int64 [R, T], tokens as they are dealt: finite ones, then those with NaN, then what is not there.
        finite: int64 [R], how many finite tokens a row has, of which only the device knows.
        parts: int64 [3, R], with a copy on the CPU: how many tokens of each row stay for their scores, how many of the
            others stay, and how many tokens there are.
    """
    top, target, _ = parts
    important, others, own = on_cpu(parts)[0]
    dealt = (finite.maximum(top + target) - top).where(target > 0, 0)
    most = (own - important).where(others > 0, 0)
    places = torch.arange(order.shape[1], dtype=torch.int64, device=order.device)
    left = order.gather(1, (top[:, None] + places[: int(most.max())]).clamp(max=order.shape[1] - 1))
    left, number = _dealt(similarity, left, dealt, most, with_copy(target, others))
    return _with(_with(order.new_zeros(order.shape, dtype=torch.bool), order, top), left, number)


def _dealt(similarity: Tensor, left: Tensor, number: Tensor, most: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """`_dealt_alone` of R rows together, for which no one waits for a GPU.

    Args:
        similarity: float [R, T, T], of all pairs.
        left: int64 [R, W], tokens of R rows in the order in which they are dealt.
        number: int64 [R], how many there are in each row, at most W.
        most: int64 [R] on the CPU, at least `number`, of which only the device knows.
        target: int64 [R], how many shall be left, with a copy on the CPU.

    Returns:
        `left` and `number` at the end.
    """
    rows = torch.arange(len(left), device=left.device)[:, None, None]
    goal = on_cpu(target)[0]
    while bool((most > goal).any()):
        most = most - _drop(most, goal)  # at least what is left of `number`: neither falls behind the other
        drop, size = _drop(number, target), int(most.max())
        first, second = left[:, ::2], left[:, 1::2]
        one, two = (torch.arange(side.shape[1], device=left.device) for side in (first, second))
        there = two < (number // 2)[:, None]
        stays = ((number + 1) // 2 - drop)[:, None]
        pairs = similarity[rows, first[..., None], second[:, None]].masked_fill(~there[:, None], -torch.inf)
        likeness = pairs.amax(2).masked_fill(one >= ((number + 1) // 2)[:, None], torch.inf)
        order = likeness.argsort(dim=1, stable=True)
        place = torch.cat([(stays - 1 - one).where(one < stays, size), (stays + two).where(there, size)], 1)
        dealt = torch.cat([first.gather(1, order), second], 1)
        left = left.new_zeros(len(left), size + 1).scatter(1, place, dealt)[:, :size]
        number = number - drop
    return left, number


def _drop(number: Tensor, target: Tensor) -> Tensor:
    """Number of tokens that a round drops."""
    return (number - target).clamp(max=AT_A_TIME).minimum(number // 2)


def _with(keep: Tensor, left: Tensor, number: Tensor) -> Tensor:
    """Return bool [R, T] with the first `number`, int64 [R], of the tokens `left`, int64 [R, W], added."""
    there = torch.arange(left.shape[1], device=left.device) < number[:, None]
    tokens = left.where(there, keep.shape[1])
    return torch.nn.functional.pad(keep, (0, 1)).scatter(1, tokens, True)[:, :-1]
