"""Kernels that a GPU would be sent, counted on the CPU.

Every operation of torch counts but for views and memory that is not filled. Those that torch composes of several
kernels on CUDA count as so many (`SEVERAL`; how many a sort takes depends on its size, about three up to 4,096 tokens).
A kernel of Triton counts as one; what the interpreter does for it does not. As in `waiting`, what is held on the CPU on
purpose does not count, and its way to the device does.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from catp_lightning.methods.selectors import fused
from catp_lightning.utils.on_cpu import with_copy
from tests.support.waiting import HOST, Functions, Waiting, as_on_gpu

aten = torch.ops.aten
NOTHING = {
    *(aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided),
    *(aten.detach, aten.alias, aten.lift_fresh, aten._unsafe_view, aten._reshape_alias, aten.promote_types),
}
SEVERAL = {
    **dict.fromkeys((aten.masked_fill, aten.scatter, aten.scatter_reduce, aten.index_put), 2),  # a copy, then in place
    aten.sort: 4,
    aten.topk: 3,
}


class Launches(Waiting):
    """What was counted: `kinds`, how many kernels by operation; Triton's are "triton"."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: Counter[str] = Counter()

    def note(self, what: str) -> None:
        super().note(what)
        if what.startswith("to: "):  # a copy to the device
            self.kinds["to"] += 1

    @property
    def total(self) -> int:
        return self.kinds.total()


class _Counting(TorchDispatchMode):
    def __init__(self, found: Launches, functions: Functions) -> None:
        super().__init__()
        self.found, self.functions, self.inside = found, functions, False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kind = func.overloadpacket
        if not (self.inside or self.functions.on_host or func.is_view or kind in NOTHING):
            self.found.kinds[kind.__name__] += SEVERAL.get(kind, 1)
        return func(*args, **(kwargs or {}))

    def launched(self, launch: Callable[..., Any]) -> Callable[..., Any]:
        """Return the launch of a Triton kernel, counted as one."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.found.kinds["triton"] += 1
            self.inside = True
            try:
                return launch(*args, **kwargs)
            finally:
                self.inside = False

        return counted


@contextmanager
def launches() -> Iterator[Launches]:
    """Count kernels while inside; selectors choose as on a GPU."""
    found = Launches()
    functions = Functions(found)
    counting = _Counting(found, functions)
    with ExitStack() as inside:
        if find_spec("triton"):
            from triton.runtime.interpreter import GridExecutor

            run = counting.launched(GridExecutor.__call__)
            inside.enter_context(patch.object(GridExecutor, "__call__", run))
        for context in (functions, counting, as_on_gpu()):
            inside.enter_context(context)
        yield found


@contextmanager
def on_kernels() -> Iterator[None]:
    """Inside, selectors choose by kernels of Triton; on the CPU its interpreter runs them."""
    with as_on_gpu(), patch.object(fused, "for_kernels", lambda like: True):
        yield


def read_before(value: Tensor) -> Tensor:
    """Return a tensor as a GPU holds it, with a copy on the CPU, as those that selectors get from a prompt."""
    setattr(value, HOST, True)
    return with_copy(value.detach().clone(), value)
