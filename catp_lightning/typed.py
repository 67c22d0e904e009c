"""Dataclasses from plain JSON values, checked against the types of their fields."""

import math
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from catp_lightning.errors import PolicyError

T = TypeVar("T")

LAYERS, NUMBERS = 1024, 2**16
"""Longest list of layers, or of rows of heads, and of real numbers, of which an image has one a token."""


class TooLong(PolicyError):
    """A list has more entries than any model has use for; of no type of a union is it right."""


def build(cls: type[T], values: Mapping[str, Any], what: str) -> T:
    """An instance of a dataclass from its arguments; lists become tuples where the field is a tuple.

    Raises:
        PolicyError: an argument is unknown, of another type than the field, not finite, or refused by the class.
    """
    assert is_dataclass(cls)
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls) if f.init]
    for name in values:
        if name not in known:
            raise PolicyError(f"{what} has no argument {name!r}; it takes {', '.join(sorted(known)) or 'none'}.")
    converted = {name: _convert(value, hints[name], f"{name} of {what}") for name, value in values.items()}
    try:
        return cls(**converted)
    except ValueError as error:
        raise PolicyError(f"{what}: {error}") from error


def _convert(value: Any, hint: Any, what: str) -> Any:
    origin, options = get_origin(hint), get_args(hint)
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
    elif hint is type(None) and value is None:
        return None
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):  # a whole number beyond all floats
            if math.isfinite(value):
                return float(value)
    elif hint in (int, bool, str) and type(value) is hint:
        return value
    raise PolicyError(f"{what} is {value!r:.200}; allowed is {_name(hint)}.")


def _converted_list(value: Sequence[Any], each: Any, what: str) -> tuple[Any, ...]:
    most = NUMBERS if each is float else LAYERS
    if len(value) > most:
        raise TooLong(f"{what} has {len(value):,} entries; at most {most:,} are allowed.")
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
