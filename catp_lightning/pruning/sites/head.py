"""Logits of a shortened prompt: the head is not run on rows that were dropped."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from catp_lightning.models.base import Family
from catp_lightning.prompt.kept import KeptSequence
from catp_lightning.utils.hooks import replaced


class Head:
    """Head of one model, which turns the decoder's output into logits.

    That output is handed back at full length, zeros where rows were dropped, and so are the logits: a linear head
    without a bias makes zeros of zeros. With a vocabulary of 152 thousand it takes a fifth as long as a prefill of 7
    billion parameters that keeps a quarter, three quarters of it for nothing. Other heads, and those that are given
    something else than the decoder's output, all its rows or what a model made of it, run as ever.

    Args:
        family: family of the model.
    """

    def __init__(self, family: Family) -> None:
        head = family.language_model.get_output_embeddings()
        self._head = head if isinstance(head, nn.Linear) and head.bias is None else None
        self._full: weakref.ref[Tensor] | None = None
        self._rows: KeptSequence | None = None

    def expect(self, full: Tensor, rows: KeptSequence) -> Tensor:
        """Return `full`, [R, L, D], the decoder's output over all columns, of which `rows` were read."""
        self._full, self._rows = weakref.ref(full), rows
        return full

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Leave dropped rows out of the head's calls while inside."""
        if self._head is None:
            yield
            return
        with replaced(self._head, "forward", self._call):
            yield

    def _call(self, forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        full = None if self._full is None else self._full()
        if full is None or self._rows is None or not _same(hidden, full):
            return forward(hidden, *args, **kwargs)
        return self._rows.scatter(forward(self._rows.gather(hidden), *args, **kwargs))


def _same(one: Tensor, other: Tensor) -> bool:
    """Return True if two tensors are the same numbers in the same memory: models take slices of all rows."""
    if one is other:
        return True
    alike = type(one) is type(other) is Tensor and one.shape == other.shape and one.stride() == other.stride()
    return alike and one.data_ptr() == other.data_ptr()
