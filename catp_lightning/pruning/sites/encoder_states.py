"""Encoder states of a pruned prompt at full length.

They can be read anywhere, but decoded from only by the pruned model that made them.
"""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from catp_lightning.errors import PruningError

NOT_OF_THIS_PROMPT = (
    "{} not filled by the last pruned prompt, or changed since: it cannot be decoded from. Generate from the prompt "
    "again."
)


class PrunedStates(Tensor):
    """Encoder states [R, L, D], zeros where a row was dropped; no decoder may project them as they are.

    R rows, L columns of the full prompt, D features. A projection by one of `readers` raises PruningError: a decoder
    that is not pruned would read the zero rows as well. Results of operations on these states are `PrunedStates` too;
    copies and pickles are plain tensors.
    """

    readers: frozenset["weakref.ref[Tensor]"]  # weights of the decoder layers that may not project these states

    @classmethod
    def of(cls, states: Tensor, readers: Iterable[nn.Linear]) -> "PrunedStates":
        found = states.as_subclass(cls)
        found.readers = frozenset(weakref.ref(module.weight) for module in readers)
        return found

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if torch.compiler.is_compiling():
            return super().__torch_function__(func, types, args, kwargs)
        source = next(value for value in tree_leaves((args, kwargs)) if isinstance(value, cls))
        readers = vars(source).get("readers", frozenset())
        if func is nn.functional.linear and any(reader() is args[1] for reader in readers):
            raise PruningError(NOT_OF_THIS_PROMPT.format("These encoder states were"))
        made = super().__torch_function__(func, types, args, kwargs)
        if isinstance(made, cls):
            made.readers = readers
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.as_subclass(Tensor).clone()
