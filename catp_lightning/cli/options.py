"""Parsing of the command line: the error for a misspelt option names the option that was meant."""

import difflib
import re
from typing import Any

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
