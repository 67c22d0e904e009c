"""Options that are lists of names, or of budgets."""

from contextlib import suppress
from typing import Any

from catp_lightning.errors import PolicyError
from catp_lightning.policy import check_keep


def listed(value: Any) -> list[str]:
    """Return names from a list, or from text with commas between them, in brackets or without."""
    several = value if isinstance(value, list) else str(value).strip("[] ").split(",")
    return [name for one in several if (name := str(one).strip("\"' "))]


def budgets(value: Any) -> list[int | float]:
    """Return budgets from one, from a list, or from text with commas between them: 1 is a token, 1.0 is everything.

    Raises:
        PolicyError: a budget is not allowed or named twice, or none is named.
    """
    several = value if isinstance(value, list) else [_number(one) for one in listed(value)]
    for keep in several:
        check_keep(keep)
    if len({(type(keep), keep) for keep in several}) < len(several) or not several:
        raise PolicyError(f"keep is {several}; give one budget or several different ones.")
    return several


def _number(text: str) -> Any:
    """Return a text as int or else as float; unchanged if it is not a number, for `check_keep` to refuse."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text
