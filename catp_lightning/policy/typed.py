"""Builds dataclasses from plain JSON values, checked against the types of their fields."""

import math
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from catp_lightning.errors import PolicyError

T = TypeVar("T")

LAYERS, NUMBERS = 1024, 2**16
"""Most entries of a list of layers or of rows of head weights, and of a list of real numbers (one for each token)."""


class TooLong(PolicyError):
    """Raised for a list with more entries than any model needs; no other type of a union is then tried."""


def build(cls: type[T], values: Mapping[str, Any], what: str) -> T:
    """Build an instance of a dataclass from arguments by name; lists become tuples where the field is a tuple.

    Args:
        cls: the dataclass.
        values: arguments by name.
        what: name of the object, for error messages.

    Raises:
        PolicyError: an argument is unknown or missing, of another type than its field, not finite, or refused by the
            class.
    """
    assert is_dataclass(cls)
    hints = _hints(cls)
    known = [f.name for f in fields(cls) if f.init]
    for name in values:
        if name not in known:
            raise PolicyError(f"{what} has no argument {name!r}; it takes {', '.join(sorted(known)) or 'none'}.")
    needed = [f.name for f in fields(cls) if f.init and f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise PolicyError(f"{what} lacks {', '.join(missing)}.")
    converted = {name: _convert(value, hints[name], f"{name} of {what}") for name, value in values.items()}
    try:
        return cls(**converted)
    except ValueError as error:
        raise PolicyError(f"{what}: {error}") from error


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _convert(value: Any, hint: Any, what: str) -> Any:
    origin, options = get_origin(hint), get_args(hint)
    inner = next((option for option in (hint, *options) if is_dataclass(option)), None)
    if inner is not None and isinstance(value, Mapping):
        return build(inner, value, what)  # type: ignore[arg-type]  # a class, as no field is an instance
    if origin in (Union, types.UnionType):
        for option in options:
            try:
                return _convert(value, option, what)
            except TooLong:
                raise
            except PolicyError:
                continue
    elif origin is Literal:
        if value in options and type(value) in {type(option) for option in options}:
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        return _converted_list(value, options[0], what)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):  # an int too large for a float
            if math.isfinite(value):
                return float(value)
    elif hint in (int, bool, str, type(None)) and type(value) is hint:
        return value
    raise PolicyError(f"{what} is {value!r:.200}; allowed is {_name(hint)}.")


def _converted_list(value: Sequence[Any], each: Any, what: str) -> tuple[Any, ...]:
    max_items = NUMBERS if each is float else LAYERS
    if len(value) > max_items:
        raise TooLong(f"{what} has {len(value):,} entries; at most {max_items:,} are allowed.")
    if each is float and set(map(type, value)) == {float} and all(map(math.isfinite, value)):
        return tuple(value)  # at once: there may be thousands, at every use of a policy
    return tuple(_convert(item, each, what) for item in value)


def _name(hint: Any) -> str:
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_name(option) for option in options)
    if origin is Literal:
        return " or ".join(map(repr, options))
    if origin is tuple:
        return f"a list of ({_name(options[0])})"
    return {
        int: "a whole number",
        float: "a finite number",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }.get(hint, str(hint))
