"""`prune_similar._together` as a kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from catp_lightning.methods.selectors.kernels import tiles


def run(similarity: Tensor, order: Tensor, finite: Tensor, parts: Tensor, at_a_time: int) -> Tensor:
    """Return what `prune_similar._together` returns: bool [R, T]."""
    rows, tokens = order.shape
    hands = order.new_empty(rows, 2, tokens, dtype=torch.int32)
    likeness, keep = similarity.new_empty(rows, 2, tokens), order.new_zeros(rows, tokens, dtype=torch.bool)
    given = (similarity.mT.contiguous(), order.contiguous(), finite, parts.contiguous(), hands, likeness, keep)
    _deal[(rows,)](*given, rows, tokens, MOST=at_a_time, **tiles(tokens))
    return keep


@triton.jit(do_not_specialize=["rows", "tokens"])
def _deal(
    similarity,  # float [R, T, T], to each token that of all others
    order,
    finite,
    parts,
    hands,  # int32 [R, 2, T]: the tokens of this round in the order in which they are dealt, and those of the next
    likeness,  # float [R, 2, T]: to the nearest on the second side, by token and by place on the first side
    keep,
    rows,
    tokens,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    row, place, some = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK), tl.arange(0, AT_ONCE)
    half, there = tl.arange(0, BLOCK // 2), place < tokens
    similarity += row * tokens * tokens
    order += row * tokens
    keep += row * tokens
    hands += 2 * row * tokens
    likeness += 2 * row * tokens
    top, goal = tl.load(parts + row).to(tl.int32), tl.load(parts + rows + row).to(tl.int32)
    count = tl.where(goal > 0, tl.maximum(tl.load(finite + row).to(tl.int32), top + goal) - top, 0)
    tl.store(keep + tl.load(order + place, mask=place < top, other=0), 1, mask=place < top)
    tl.store(hands + place, tl.load(order + top + place, mask=place < count, other=0), mask=place < count)
    tl.debug_barrier()
    now, later = 0, tokens
    while count > goal:
        second = count // 2
        first = count - second
        stay = first - tl.minimum(tl.minimum(MOST, count - goal), second)
        # The nearest on the second side, to every token.
        like = tl.full((BLOCK,), float("-inf"), similarity.dtype.element_ty)
        for start in range(0, second, AT_ONCE):
            inside = start + some < second
            other = tl.load(hands + now + 2 * (start + some) + 1, mask=inside, other=0)
            to_others = similarity + other[:, None] * tokens + place[None]
            own = tl.load(to_others, mask=inside[:, None] & there[None], other=float("-inf"))
            like = tl.maximum(like, tl.max(own, 0))
        tl.store(likeness + place, like, mask=there)
        tl.debug_barrier()
        # The first side from the least similar on, of equal ones the first.
        token = tl.load(hands + now + 2 * half, mask=half < first, other=0)
        key = tl.load(likeness + token, mask=half < first, other=0.0)
        tl.store(likeness + tokens + half, key, mask=half < first)
        tl.debug_barrier()
        at = tl.zeros((BLOCK // 2,), tl.int32)
        for start in range(0, first, AT_ONCE):
            rival, inside = (start + some)[:, None], (start + some < first)[:, None]
            known = tl.load(likeness + tokens + rival, mask=inside, other=0.0)
            sooner = (known < key[None]) | ((known == key[None]) & (rival < half[None]))
            at += tl.sum((inside & sooner).to(tl.int32), 0)
        # Those that stay, the most similar first, and then the second side.
        tl.store(hands + later + stay - 1 - at, token, mask=(half < first) & (at < stay))
        other = tl.load(hands + now + 2 * half + 1, mask=half < second, other=0)
        tl.store(hands + later + stay + half, other, mask=half < second)
        count = stay + second
        now, later = later, now
        tl.debug_barrier()
    tl.store(keep + tl.load(hands + now + place, mask=place < count, other=0), 1, mask=place < count)
