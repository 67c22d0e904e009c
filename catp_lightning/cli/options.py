"""Parsing of the command line: a misspelt option is told the one that was meant; lists of names and of numbers."""

import difflib
import re
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, cast

from jsonargparse import ArgumentError, ArgumentParser

from catp_lightning.errors import PolicyError
from catp_lightning.policy import check_keep


def parsed(parser: ArgumentParser, args: list[str]) -> Any:
    """Parse arguments and return the result of the parser.

    Raises:
        ArgumentError: an argument is unknown, missing or of another type.
    """
    try:
        return parser.parse_args(args)
    except ArgumentError as error:
        known = [option for option in parser._option_string_actions if option.startswith("--")]
        unknown = re.search(r"unrecognized arguments:.*?(--[^\s=]+)", str(error), re.IGNORECASE)
        near = difflib.get_close_matches(unknown[1], known, n=1) if unknown else []
        raise ArgumentError(None, f"{error}. Did you mean {near[0]}?" if near else str(error)) from error


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


LMMS_TASK = re.compile(r"--lmms[-_]task(?:=(.*))?", re.DOTALL)
LMMS = "catp_lightning.integrations.lmms_eval.calibration"


def with_lmms_task(args: list[str]) -> list[str]:
    """Return arguments in which `--lmms_task NAME` is written out: the module, the data and the task it stands for.

    Raises:
        ArgumentError: no task is named, or lmms-eval is not installed.
    """
    found = next((place for place, arg in enumerate(args) if LMMS_TASK.fullmatch(arg)), None)
    if found is None:
        return args
    rest = args[found + 1 :]
    name = cast(re.Match[str], LMMS_TASK.fullmatch(args[found]))[1]
    if name is None and rest:
        name, *rest = rest
    if not name:
        raise ArgumentError(None, "--lmms_task needs the name of a task: `lmms-eval tasks subtasks` lists them.")
    if find_spec("lmms_eval") is None:
        raise ArgumentError(None, "--lmms_task needs lmms-eval: pip install 'catp-lightning[lmms]'.")
    chosen = [f"--model={LMMS}.LmmsModule", f"--data={LMMS}.LmmsTask", f"--data.task={name}"]
    return [*args[:found], *chosen, *rest]
