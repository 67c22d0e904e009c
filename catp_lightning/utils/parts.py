"""Parts of a module, found in one walk: `named_modules` passes each of them up through every level above it."""

from torch import nn


def parts_of(module: nn.Module) -> dict[nn.Module, str]:
    """Return a module and all its parts, each with its attribute path, in the order of `named_modules`."""
    found: dict[nn.Module, str] = {}
    left = [("", module)]
    while left:
        path, part = left.pop()
        if part in found:
            continue
        found[part] = path
        inside = [(name, child) for name, child in part._modules.items() if child is not None]
        left += [(f"{path}.{name}" if path else name, child) for name, child in reversed(inside)]
    return found
