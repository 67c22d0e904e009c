"""Parsing of the command line: the error for a misspelt option names the option that was meant."""

import difflib
import re
from importlib.util import find_spec
from typing import Any, cast

from jsonargparse import ArgumentError, ArgumentParser


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
