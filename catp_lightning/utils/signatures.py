"""Names of the parameters of functions, looked up once: contexts are entered often, and a model has many layers."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any


def parameters_of(call: Callable[..., Any]) -> list[str]:
    """Return the names of a function's parameters, of a method's without `self`.

    >>> parameters_of("a b".split)
    ['sep', 'maxsplit']
    """
    if inspect.ismethod(call):
        return list(_parameters(call.__func__)[1:])
    return list(_parameters(call) if inspect.isfunction(call) else inspect.signature(call).parameters)


@lru_cache(maxsize=256)
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)
