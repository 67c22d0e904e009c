"""`determinant._choose` as a kernel."""

import triton
import triton.language as tl
from torch import Tensor

from catp_lightning.methods.selectors.kernels import tiles


def run(
    kernel: Tensor, gain: Tensor, closed: Tensor, chosen: Tensor, gains: Tensor, factors: Tensor, ridge: float
) -> None:
    """Fill in what `determinant._choose` does; `gain` and `closed` stay as they are."""
    rows, tokens = gain.shape
    given = (kernel.contiguous(), gain.contiguous(), closed.contiguous(), chosen, gains, factors)
    _choose[(rows,)](*given, tokens, chosen.shape[1], RIDGE=ridge, **tiles(tokens))


@triton.jit(do_not_specialize=["tokens", "steps"])
def _choose(
    kernel,
    gain,
    closed,
    chosen,
    gains,
    factors,
    tokens,
    steps,
    RIDGE: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    own, there, some = row * tokens + place, place < tokens, tl.arange(0, AT_ONCE)
    kernel += row * tokens * tokens
    factors += row * steps * tokens
    ridge = tl.full((BLOCK,), RIDGE, tl.float64)
    left = tl.load(gain + own, mask=there, other=1.0)
    free = tl.load(closed + own, mask=there, other=1) == 0
    for step in range(steps):
        value, best = tl.max(tl.where(free, left, float("-inf")), 0, return_indices=True)
        tl.store(chosen + row * steps + step, best)
        tl.store(gains + row * steps + step, value)
        free = free & (place != best)
        before = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, step, AT_ONCE):
            past = first + some
            of_best = tl.load(factors + past * tokens + best, mask=past < step, other=0.0)
            columns = factors + past[:, None] * tokens + place[None]
            inside = (past < step)[:, None] & there[None]
            before += tl.sum(of_best[:, None] * tl.load(columns, mask=inside, other=0.0), 0)
        column = tl.load(kernel + best * tokens + place, mask=there, other=0.0) - before
        column = column / tl.sqrt(tl.maximum(value, ridge))  # where no token is left the value is -inf
        most_taken = tl.sqrt(tl.maximum(left - ridge, 0.0))
        column = tl.minimum(tl.maximum(column, -most_taken), most_taken)
        tl.store(factors + step * tokens + place, column, mask=there)
        left = tl.maximum(left - column * column, ridge)
        tl.debug_barrier()  # the next step reads this column
