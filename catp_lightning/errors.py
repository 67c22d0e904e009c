"""Errors a person can act on: a message says what was wrong, the value, what is allowed, what to do next."""

import difflib
from collections.abc import Iterable

from catp_lightning.safe_text import one_line, printable


class _Told(Exception):
    """Base of errors whose message is safe to show: it names text of others, and may reach a terminal from anywhere."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(_told(arg) if isinstance(arg, str) else arg for arg in args))


def _told(message: str) -> str:
    """Return a message as one safe line; one from a DataLoader's worker process keeps the lines of its traceback."""
    return printable(message) if message.startswith("Caught ") else one_line(message)


class PolicyError(_Told, ValueError):
    """A policy, or a file that should hold one, is wrong, damaged, or made for another model."""


class DataError(_Told, ValueError):
    """A data set is incomplete or damaged: a file, an image or an id is missing or unreadable."""


class PruningError(_Told, RuntimeError):
    """A model, a call or an option cannot be pruned exactly; nothing is ever left unpruned in silence."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return the end of a message on an unknown name, with the known one nearest to it; "" if none is near.

    >>> did_you_mean("strid", ["random", "stride"]), did_you_mean("x", ["stride"])
    (" Did you mean 'stride'?", '')
    """
    near = difflib.get_close_matches(str(name)[:100], list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
