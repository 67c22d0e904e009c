"""Immutable JSON values, so that the checked contents of a policy cannot change, and limits of their size."""

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from catp_lightning.errors import PolicyError

DEEPEST = 64
"""Deepest nesting of dictionaries and lists in a policy; a calibration's evidence has 5 levels."""

LARGEST = 2**22
"""Most bytes of a policy's JSON, 4 MiB; that of a calibration with fingerprints of 100,000 images has 1.5 MB."""

MAX_VALUES = 2**18
"""Most numbers, texts, lists and dictionaries in a policy; that of a calibration has about ten thousand."""


def _refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise TypeError(
        "A policy cannot be changed: make another, dataclasses.replace(policy, scorer_args={...}), or change what "
        "policy.to_dict() gives and take PruningPolicy.from_dict(...)."
    )


class FrozenDict(dict[str, Any]):
    """A dictionary that cannot be changed; equal to a plain dictionary, serialisable by `json`, and hashable."""

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return FrozenDict, (dict(self),)  # otherwise unpickling and deepcopy would set item by item


class FrozenList(list[Any]):
    """A list that cannot be changed; equal to a plain list, serialisable by `json`, and hashable."""

    __setitem__ = __delitem__ = __iadd__ = __imul__ = append = extend = insert = pop = remove = clear = sort = (
        reverse
    ) = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self))

    def __reduce__(self) -> tuple[type, tuple[list[Any]]]:
        return FrozenList, (list(self),)


def frozen(name: str, value: Any) -> FrozenDict:
    """Return a frozen copy, at all levels, of a dictionary of plain JSON types; tuples become lists.

    Args:
        name: name of the value, for error messages.
        value: the dictionary.

    Raises:
        PolicyError: `value` is not a dictionary with strings as keys, holds something that JSON cannot, or is too large
            or nested too deep.
    """
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise PolicyError(f"{name} must be a dictionary with names as keys, got {_shown(value)}.")
    check_size(name, value)
    try:
        copy = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise PolicyError(f"{name} holds a value that JSON cannot hold: {error!s:.200}.") from error
    found = _frozen(copy)
    assert isinstance(found, FrozenDict)
    return found


def check_size(name: str, value: Any, deepest: int = DEEPEST) -> None:
    """Raise PolicyError if a value holds more than `MAX_VALUES` values or `LARGEST` text, or is nested too deep.

    Nothing is copied, and no more is read than a policy may hold, so that a value that contains itself is refused too.

    Args:
        name: name of the value, for error messages.
        value: dictionaries, lists and tuples within each other.
        deepest: most levels of nesting.
    """
    level, values, text = [value], 1, 0
    for _ in range(deepest + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                text += sum(len(key) for key in item if isinstance(key, str))
                inner += item.values()
            elif isinstance(item, list | tuple):
                inner += item
            elif isinstance(item, str):
                text += len(item)
            if values + len(inner) > MAX_VALUES or text > LARGEST:
                raise PolicyError(too_large(name))
        if not inner:
            return
        level, values = inner, values + len(inner)
    raise PolicyError(f"{name} is nested deeper than {deepest} levels. Leave what is there out.")


def too_large(name: str) -> str:
    """Error message for a policy, or a part of one, that is larger than any calibration makes it."""
    return (
        f"{name} is too large: a policy holds at most {MAX_VALUES:,} values, of {LARGEST // 2**20} MiB. Leave some out."
    )


def _shown(value: Any) -> str:
    """Short text of any value for an error message: a plain value's repr, or the name of its type."""
    return f"{value!r:.200}" if isinstance(value, str | bytes | int | float | None) else f"a {type(value).__name__}"


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return FrozenDict({key: _frozen(item) for key, item in value.items()})
    if isinstance(value, list):
        return FrozenList([_frozen(item) if isinstance(item, dict | list) else item for item in value])
    return value
