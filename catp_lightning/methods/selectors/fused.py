"""Loops over steps that are one kernel on CUDA; elsewhere, and where the kernel cannot run, the loops themselves."""

from collections.abc import Callable
from functools import cache, update_wrapper
from importlib import import_module
from importlib.util import find_spec
from typing import Generic, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from catp_lightning.utils.messages import warn

P = ParamSpec("P")
T = TypeVar("T")

MOST_TOKENS = 8192
"""Tokens of the longest rows that kernels work on: a program's threads hold a value of each in their registers."""


def for_kernels(like: Tensor) -> bool:
    """Return True if kernels work on rows like these, [R, T, ...]: on CUDA, with Triton, which torch brings there."""
    return like.is_cuda and 0 < like.shape[1] <= MOST_TOKENS and len(like) > 0 and _triton_is_there()


@cache
def _triton_is_there() -> bool:
    return find_spec("triton") is not None


class Fused(Generic[P, T]):
    """A loop over steps, of which each sends a GPU a few kernels, and the one kernel that stands for it.

    The kernels have not been run on a GPU, only compiled for some. Whatever goes wrong when one is started, the loop
    takes over: once with a warning, from then on without another try. An error that CUDA reports later, when Python
    has gone on, cannot be caught here.

    Args:
        loop: the loop; its first argument is a tensor [R, T, ...].
        kernel: name of the file in `kernels` whose `run` has the arguments and the result of the loop. What it has
            begun when it fails may not change what the loop then does.
        constants: numbers that the loop knows and `run` is given beside the arguments.
    """

    def __init__(self, loop: Callable[P, T], kernel: str, constants: dict[str, float]) -> None:
        update_wrapper(self, loop)
        self.loop, self.kernel, self.constants, self.broken = loop, kernel, constants, False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        like = args[0]
        assert isinstance(like, Tensor)
        if for_kernels(like) and not self.broken:
            try:
                file = import_module(f"catp_lightning.methods.selectors.kernels.{self.kernel}")
                with torch.cuda.device_of(like):
                    return cast(T, file.run(*args, **kwargs, **self.constants))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self.broken = True
                reason = (str(error).strip() or "no reason given").splitlines()[0]
                warn(
                    f"The kernel of {self.kernel} does not run here ({type(error).__name__}: {reason}). Operations of "
                    "torch choose the same tokens instead, but start kernels at each step. Please report this with the "
                    "versions of torch and triton and the name of the GPU.",
                    stacklevel=2,
                )
        return self.loop(*args, **kwargs)


def fused(kernel: str, **constants: float) -> Callable[[Callable[P, T]], Fused[P, T]]:
    """Decorate a loop that the kernel of that name stands for."""
    return lambda loop: Fused(loop, kernel, constants)
