"""Compile all kernels for a CUDA capability, without a GPU: `python -m tests.support.compiled_kernels 80` prints them.

What a kernel is called with decides its types; each is compiled in the place of being run.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from catp_lightning.methods.selectors.kernels import determinant, facility_location, max_min, prune_similar, recycle
from catp_lightning.utils.on_cpu import with_copy

POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def main(arguments: Sequence[str]) -> None:
    """Compile, and print the names of what was."""
    target = GPUTarget("cuda", int(arguments[0]), 32)

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **given: Any) -> None:
        constants = {name: value for name, value in given.items() if name not in OPTIONS}
        types = {
            name: POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
            for name, value in zip(self.arg_names, args, strict=False)
        }
        source = ASTSource(
            self,
            types | dict.fromkeys(constants, "constexpr"),
            {(self.arg_names.index(name),): value for name, value in constants.items()},
        )
        options = {name: value for name, value in given.items() if name in OPTIONS}
        if triton.compile(source, target=target, options=options).asm["cubin"]:
            print(self.fn.__name__)

    JITFunction.run = compiled
    tokens, steps = 100, 30
    real, integers = torch.zeros(1, tokens, dtype=torch.float64), torch.zeros(1, tokens, dtype=torch.int64)
    pairs, there = real[..., None] + real[:, None], torch.ones(1, tokens, dtype=torch.bool)
    factors = real.new_zeros(1, steps, tokens)
    determinant.run(pairs, real, there, integers[:, :steps], real[:, :steps], factors, ridge=1e-4)
    max_min.run(pairs.float(), there, there, steps)
    facility_location.run(pairs, real, there, there, steps)
    of_rows = torch.tensor([[10], [20], [tokens]])
    prune_similar.run(pairs.float(), integers, integers[:, 0], of_rows, at_a_time=8)
    recycle.run(pairs.float(), integers, with_copy(torch.tensor([[20], [30], [4]]), torch.tensor([[20], [30], [4]])))


if __name__ == "__main__":
    main(sys.argv[1:])
