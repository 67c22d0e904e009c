"""Scoped forward hooks that are opaque to torch.compile: a graph break at the hook, a recompile when hooks change.

A module with hooks cannot be copied or pickled: the hooks would be part of the copy for good.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from catp_lightning.errors import PruningError

Hook = Callable[..., Any]


class Seen(partial):  # type: ignore[type-arg]
    """Wrapper of a module's own forward, set on the module itself while hooks are in place.

    Compiled code is not told that a module has hooks (`skip_nnmodule_hook_guards`): what was compiled earlier, anywhere
    in the process, would run on without them. It is told that a module's forward is another object.
    """


@contextmanager
def hooked(
    module: nn.Module, before: Hook | None = None, after: Hook | None = None, always: bool = False
) -> Iterator[None]:
    """Call hooks before and after a module's forward while inside; they may change its arguments and output.

    What hooks do depends on the data: compiled code has a graph break where they are called instead of tracing them.

    Args:
        module: the module whose calls are hooked.
        before: (module, args, kwargs) -> None, or other (args, kwargs).
        after: (module, args, kwargs, output) -> None, or another output.
        always: True to call `after` also if the module raised; its output is then None.
    """
    handles: list[RemovableHandle] = []
    own, seen = module.__dict__.get("forward"), None
    try:  # from here on: an interrupt may come at any line
        if before is not None:
            handles.append(module.register_forward_pre_hook(_ours(untraced(before)), with_kwargs=True))
        if after is not None:
            handles.append(module.register_forward_hook(_ours(untraced(after)), with_kwargs=True, always_call=always))
        if not isinstance(own, Seen):
            module.__dict__["forward"] = seen = Seen(module.forward)
        with not_copied(module):
            yield
    finally:
        for handle in reversed(handles):
            handle.remove()
        if seen is not None and module.__dict__.get("forward") is seen:
            del module.__dict__["forward"]
            if own is not None:  # set on this very module by another package: accelerate does
                module.__dict__["forward"] = own


@contextmanager
def replaced(module: nn.Module, name: str, call: Callable[..., Any]) -> Iterator[None]:
    """Replace `module.<name>(...)` by `call(original, ...)` while inside; only this very object is touched."""
    original, own = getattr(module, name), module.__dict__.get(name)
    seen = untraced(call)
    try:  # from here on: an interrupt may come at any line
        module.__dict__[name] = _ours(lambda *args, **kwargs: seen(original, *args, **kwargs))
        with not_copied(module):
            yield
    finally:
        module.__dict__.pop(name, None)
        if own is not None:  # set on this very model by another package
            module.__dict__[name] = own


HOW, PREFIX = "__reduce_ex__", "_catp_"


@contextmanager
def not_copied(module: nn.Module) -> Iterator[None]:
    """Refuse to copy or pickle a module, or what it is a part of, while inside.

    Processes that are spawned get the module without hooks and marks of this package.
    """
    own = partial(_reduced, module)
    try:  # from here on: an interrupt may come at any line
        module.__dict__.setdefault(HOW, own)  # copy and pickle ask an object for this first
        yield
    finally:
        if module.__dict__.get(HOW) is own:
            del module.__dict__[HOW]


def _reduced(module: nn.Module, protocol: Any) -> Any:
    if get_spawning_popen() is None:  # a worker's collate_fn may be a method of the user's module
        raise PruningError(
            "A model that is being pruned or calibrated, or a part of one, cannot be copied or pickled: what is hooked "
            "into it would be part of the copy for good. Copy it before the context or after it; its state_dict can be "
            "taken inside."
        )
    _refuse_local_hooks(module)
    how: Any = type(module).__reduce_ex__(module, protocol)
    return (*how[:2], _without_ours(how[2]), *how[3:])


def _refuse_local_hooks(module: nn.Module) -> None:
    """Raise PruningError if a module has hooks, not of this package, that pickle cannot find by their names."""
    hooks = [hook for part in module.modules() for name in (_BEFORE, _AFTER) for hook in vars(part)[name].values()]
    names = [getattr(hook, "__qualname__", "") for hook in hooks if not hasattr(hook, OURS)]
    if local := next((name for name in names if "<locals>" in name), None):
        raise PruningError(
            "A worker process that is started (spawn, forkserver) is sent collate_fn and the data set, and with them "
            f"this {type(module).__name__}, which has a hook that cannot be sent: {local}. transformers sets some at "
            "the first call, unpruned as well. Make collate_fn a function, or a method of something that does not hold "
            'the model; or use multiprocessing_context="fork", or num_workers=0.'
        )


def _without_ours(state: dict[str, Any]) -> dict[str, Any]:
    """Return a module's attributes as they are outside of all contexts."""
    kept: dict[str, Any] = {}
    for name, value in state.items():
        if name == HOW or name.startswith(PREFIX) or hasattr(value, OURS):
            continue
        if isinstance(value, Seen):
            if not hasattr(value.func, "__self__"):  # set on this very module by another package
                kept[name] = value.func
        elif name in _HOOKS:
            ours = {number for number, hook in state[_HOOKS[name]].items() if hasattr(hook, OURS)}
            kept[name] = type(value)((number, hook) for number, hook in value.items() if number not in ours)
        else:
            kept[name] = value
    return kept


OURS = "_catp_own"  # attribute of hooks and calls of this package
_BEFORE, _AFTER = "_forward_pre_hooks", "_forward_hooks"
_HOOKS = {
    **dict.fromkeys((_BEFORE, f"{_BEFORE}_with_kwargs"), _BEFORE),
    **dict.fromkeys((_AFTER, f"{_AFTER}_with_kwargs", f"{_AFTER}_always_called"), _AFTER),
}


def _ours(call: Hook) -> Hook:
    setattr(call, OURS, True)
    return call


def untraced(hook: Hook) -> Hook:
    """Return the function excluded from torch.compile: Python runs it, and compiled code breaks off there."""
    disabled: Hook = torch.compiler.disable(hook)
    return disabled
