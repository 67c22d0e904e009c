"""`max_min._choose` as a kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from catp_lightning.methods.selectors.kernels import blocks


def run(similarity: Tensor, finite: Tensor, visual: Tensor, max_tokens: int) -> Tensor:
    """Return what `max_min._choose` returns: int64 [R, T]."""
    tokens = visual.shape[1]
    ranks = torch.full(visual.shape, max_tokens, device=visual.device, dtype=torch.int64)
    given = (similarity.contiguous(), similarity.amax(2), finite.contiguous(), visual.contiguous(), ranks)
    _choose[(len(visual),)](*given, tokens, max_tokens, **blocks(tokens))
    return ranks


@triton.jit(do_not_specialize=["tokens", "steps"])
def _choose(similarity, nearest, finite, visual, ranks, tokens, steps, BLOCK: tl.constexpr):
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    own, there = row * tokens + place, place < tokens
    similarity += row * tokens * tokens
    near = tl.load(nearest + own, mask=there, other=0.0)
    known = tl.load(finite + own, mask=there, other=0) != 0
    left = tl.load(visual + own, mask=there, other=0) != 0
    for step in range(steps):
        value, best = tl.min(tl.where(left, tl.where(known, near, 2.0), float("inf")), 0, return_indices=True)
        tl.store(ranks + row * tokens + best, step, mask=value < float("inf"))
        left = left & (place != best)
        reach = tl.load(similarity + best * tokens + place, mask=there, other=0.0)
        near = tl.where(step == 0, reach, tl.maximum(near, reach))
