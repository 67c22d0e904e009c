"""Calls that would wait for a GPU, counted on the CPU: every one that this package makes, with its line.

A kernel is sent to a GPU and Python goes on; it waits where it asks for a value, or for a number of elements that
depends on values. Here all tensors are on the CPU. Those that a program holds there on purpose come from a copy, which
counts, or were made with `device="cpu"` in so many words, and all that is computed of them alone; all others stand for
tensors on the GPU.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import catp_lightning
from catp_lightning.methods.selectors import determinant, facility_location, lazy, max_min, prune_similar, similarity

OURS, TORCH = Path(catp_lightning.__file__).parent, str(Path(torch.__file__).parent)
PLUMBING = (TORCH, str(Path(__file__)), str(OURS / "utils" / "on_cpu.py"))
HOST = "on_the_host"  # attribute of tensors that a program holds on the CPU on purpose
aten = torch.ops.aten
READS = {
    *(aten._local_scalar_dense, aten.nonzero, aten.nonzero_numpy, aten.masked_select, aten.equal, aten.is_nonzero),
    *(aten._unique2, aten.unique_consecutive, aten.unique_dim, aten.bincount),
}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPIES = {Tensor.cpu, Tensor.numpy, Tensor.tolist}
MAKES = {torch.tensor, torch.as_tensor, Tensor.new_tensor}


class Waiting:
    """What was counted: `lines`, a line "file:number what" for each call of this package that waits."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, what: str) -> None:
        if (line := calling_line()) is not None:
            self.lines.append(f"{line} {what}")


def calling_line() -> str | None:
    """Return the line of this package, "file:number", that calls torch; None if another package's or a test's does."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((*PLUMBING, "<")):
        frame = frame.f_back
    file = Path(frame.f_code.co_filename)
    return f"{file.relative_to(OURS)}:{frame.f_lineno}" if file.is_relative_to(OURS) else None


@contextmanager
def waiting() -> Iterator[Waiting]:
    """Count calls that wait while inside."""
    found = Waiting()
    with Functions(found) as functions, _Kernels(found, functions), as_on_gpu():
        yield found


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Inside, selectors choose as they do on a GPU: by operations of torch, all rows together."""
    with ExitStack() as patches:
        for module in (determinant, facility_location, lazy, max_min, prune_similar, similarity):
            patches.enter_context(patch.object(module, "for_numpy", lambda like: False))
        yield


class Functions(TorchFunctionMode):
    def __init__(self, found: Waiting) -> None:
        super().__init__()
        self.found, self.on_host = found, False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") == "__get__":  # a property
            return func(*args, **kwargs)
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        host = all(hasattr(value, HOST) for value in given) if given else _named_cpu(func, args, kwargs)
        to_host = _named_cpu(func, args, kwargs) or func in COPIES
        if given and not host and to_host:
            self.found.note(f"{func.__name__}: copied to the CPU")
        if func in MAKES and not _named_cpu(func, args, kwargs) and not (given and func is torch.as_tensor):
            self.found.note(f"{func.__name__}: copied from the CPU")
        devices = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.device)]
        moved = func is Tensor.to and host and bool(devices) and calling_line() is not None
        if moved and not kwargs.get("non_blocking"):
            self.found.note("to: copied from the CPU, and waited for")
        if given and not host and not to_host and any(hasattr(value, HOST) and value.dim() for value in given):
            self.found.note(f"{func.__name__}: of tensors on the CPU and on the GPU")
        if func is torch.repeat_interleave or func is Tensor.repeat_interleave:
            repeats = kwargs.get("repeats", args[1] if len(args) > 1 else args[0])
            if isinstance(repeats, Tensor) and not host and kwargs.get("output_size") is None:
                self.found.note("repeat_interleave: of a length that depends on values")
        before, self.on_host = self.on_host, host or to_host or func in MAKES
        try:
            made = func(*args, **kwargs)
        finally:
            self.on_host = before
        if isinstance(made, Tensor) and any(made is value for value in given) and (to_host or moved):
            made = made.detach()  # an object of its own: a copy, where there are two memories
        for value in tree_leaves(made) if (host and not moved) or to_host else ():
            if isinstance(value, Tensor):
                setattr(value, HOST, True)
        if moved and hasattr(made, HOST):
            delattr(made, HOST)
        return made


def _named_cpu(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """True if a call says "cpu" in so many words."""
    return (kwargs.get("device") == "cpu" and isinstance(kwargs["device"], str)) or (
        func is Tensor.to and "cpu" in args[1:2]
    )


class _Kernels(TorchDispatchMode):
    def __init__(self, found: Waiting, functions: Functions) -> None:
        super().__init__()
        self.found, self.functions = found, functions

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kind = func.overloadpacket
        waits = kind in READS or (kind in INDEXED and any(_is_mask(index) for index in args[1]))
        if waits and not self.functions.on_host:
            self.found.note(kind.__name__)
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
