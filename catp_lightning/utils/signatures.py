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
    function = getattr(call, "__func__", None)
    return list(inspect.signature(call).parameters) if function is None else list(_parameters(function)[1:])


@lru_cache(maxsize=256)
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)
