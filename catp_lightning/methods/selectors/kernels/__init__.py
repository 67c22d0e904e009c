"""Selectors' loops as kernels of Triton, one file a selector; only `fused` imports them, for tensors on CUDA.

One program works on one row of the batch, from the first step to the last: a choice is one launch whatever its number
of steps. All tokens of a row are one block, of a power of two. What threads write into global memory for each other is
read behind a barrier. Sums are made in one order for all tokens, so that equal tokens stay equal, and of equal values
the lowest index wins, as in the loops. Numbers that float32 does not hold are no literals here: Triton rounds those.

The kernels are tested on the CPU by Triton's interpreter, and compiled for CUDA. They have not been run on a GPU.
"""

from typing import Any

import triton

OPTIONS: dict[str, Any] = {"num_stages": 1, "enable_fp_fusion": False}
"""Loads stay where they are written, and products are rounded before they are added, as in torch."""


def blocks(tokens: int) -> dict[str, Any]:
    """Return how rows of so many tokens are worked on, all tokens at once, 64 of them by a warp, of which 4 to 32 are.

    `BLOCK` is the number of tokens of a block, a power of two that holds a row.
    """
    block = max(16, triton.next_power_of_2(tokens))
    return {"BLOCK": block, "num_warps": min(32, max(4, block // 64)), **OPTIONS}


def tiles(tokens: int) -> dict[str, Any]:
    """Return the same, where rows of a matrix are read: `AT_ONCE` of them at once, 8 values by a thread."""
    own = blocks(tokens)
    return {"AT_ONCE": max(1, min(64, 8 * 32 * own["num_warps"] // own["BLOCK"])), **own}
