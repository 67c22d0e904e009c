"""`facility_location._together` as a kernel, in which gains change by what came nearer alone, as in `_alone`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from catp_lightning.methods.selectors.kernels import tiles


def run(distance: Tensor, nearest: Tensor, finite: Tensor, visual: Tensor, max_tokens: int) -> Tensor:
    """Return what `facility_location._together` returns: int64 [R, T]."""
    tokens = visual.shape[1]
    ranks = torch.full(visual.shape, max_tokens, device=visual.device, dtype=torch.int64)
    # Nothing is farther than `nearest` is at the beginning.
    gain = nearest.sum(1, keepdim=True) - (distance @ finite.to(distance.dtype)[..., None])[..., 0]
    changed = torch.empty_like(visual, dtype=torch.int32), torch.empty_like(nearest), torch.empty_like(nearest)
    given = (
        distance.contiguous(),
        gain,
        nearest.contiguous(),
        finite.contiguous(),
        visual.contiguous(),
        ranks,
        *changed,
    )
    _choose[(len(visual),)](*given, tokens, max_tokens, **tiles(tokens))
    return ranks


@triton.jit(do_not_specialize=["tokens", "steps"])
def _choose(
    distance,
    gain,
    nearest,
    finite,
    visual,
    ranks,
    changed,  # int32 [R, T]: tokens that came nearer at this step
    before,  # float64 [R, T]: how far they were
    after,  # float64 [R, T]: how far they are
    tokens,
    steps,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    start, there, some = row * tokens, place < tokens, tl.arange(0, AT_ONCE)
    distance += start * tokens
    near = tl.load(nearest + start + place, mask=there, other=0.0)
    known = tl.load(finite + start + place, mask=there, other=0) != 0
    left = tl.where(known, tl.load(gain + start + place, mask=there, other=0.0), -1.0)
    left = tl.where(tl.load(visual + start + place, mask=there, other=0) != 0, left, float("-inf"))
    for step in range(steps):
        value, best = tl.max(left, 0, return_indices=True)
        tl.store(ranks + start + best, step, mask=value > float("-inf"))
        left = tl.where(place == best, float("-inf"), left)
        apart = tl.load(distance + best * tokens + place, mask=there, other=0.0)
        nearer = there & (apart < near)
        number = tl.sum(nearer.to(tl.int32), 0)
        at = start + tl.cumsum(nearer.to(tl.int32), 0) - 1
        tl.store(changed + at, place, mask=nearer)
        tl.store(before + at, near, mask=nearer)
        tl.store(after + at, apart, mask=nearer)
        tl.debug_barrier()  # threads read what others listed
        for first in range(0, number, AT_ONCE):
            listed, inside = start + first + some, first + some < number
            token = tl.load(changed + listed, mask=inside, other=0)
            far = tl.load(before + listed, mask=inside, other=0.0)
            now = tl.load(after + listed, mask=inside, other=0.0)
            own = tl.load(
                distance + token[:, None] * tokens + place[None], mask=inside[:, None] & there[None], other=0.0
            )
            lost = tl.sum(tl.maximum(far[:, None] - tl.maximum(own, now[:, None]), 0.0), 0)
            left -= lost  # of tokens that are not known all lose alike: their features are zeros
        near = tl.minimum(near, apart)
        tl.debug_barrier()  # before the list is written anew
