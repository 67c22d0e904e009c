"""Hooks that are in place for a while. torch.compile calls them, never looks into them, and never runs past them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Hook = Callable[..., Any]


class Seen(partial):  # type: ignore[type-arg]
    """A module's own forward, on the module itself while hooks are in place.

    Compiled code is not told that a module has hooks (`skip_nnmodule_hook_guards`): what was compiled earlier, anywhere
    in the process, would run on without them. It is told that a module's forward is another object.
    """


@contextmanager
def hooked(
    module: nn.Module, before: Hook | None = None, after: Hook | None = None, always: bool = False
) -> Iterator[None]:
    """While inside, a module's calls are seen, and may be changed, by hooks.

    What hooks do depends on the data: compiled code breaks off where they are called instead of tracing them.

    Args:
        module: whose calls.
        before: (module, args, kwargs) -> None, or other (args, kwargs).
        after: (module, args, kwargs, output) -> None, or another output.
        always: whether `after` is called where the module raised, too; its output is then None.
    """
    handles: list[RemovableHandle] = []
    own, seen = module.__dict__.get("forward"), None
    try:  # from here on: an interrupt may come at any line
        if before is not None:
            handles.append(module.register_forward_pre_hook(untraced(before), with_kwargs=True))
        if after is not None:
            handles.append(module.register_forward_hook(untraced(after), with_kwargs=True, always_call=always))
        if not isinstance(own, Seen):
            module.__dict__["forward"] = seen = Seen(module.forward)
        yield
    finally:
        for handle in reversed(handles):
            handle.remove()
        if seen is not None and module.__dict__.get("forward") is seen:
            del module.__dict__["forward"]
            if own is not None:  # somebody else's, who set it on this very module: accelerate does
                module.__dict__["forward"] = own


def untraced(hook: Hook) -> Hook:
    """The same function, run as Python runs it: compiled code that comes to it breaks off."""
    disabled: Hook = torch.compiler.disable(hook)
    return disabled
