"""The command `catp completion`: a script by which a shell completes commands, options and names that they take."""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from importlib.resources import files
from inspect import signature
from shlex import join
from typing import Any, Literal, get_args, get_origin

import shtab
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, capture_parser

from catp_lightning.cli.command import ConfigFile
from catp_lightning.cli.league import league_parser
from catp_lightning.cli.options import parsed
from catp_lightning.cli.recipe import recipe_parser
from catp_lightning.data import SHIPPED
from catp_lightning.evaluation.recipes import names
from catp_lightning.methods.scorers import SCORERS
from catp_lightning.methods.selectors import SELECTORS

SHELLS = ("bash", "zsh", "fish")
PATHS = {"--ckpt_path", "--output", "--policy"}
"""Options whose values are files and folders."""


def completion(args: list[str], summaries: Mapping[str, str], run: Callable[[str], None]) -> None:
    """Run `catp completion`.

    Args:
        args: the arguments after `completion`.
        summaries: what each command of `catp` does, by its name.
        run: runs the command of a name without arguments; it is stopped where its parser of jsonargparse parses them.

    Raises:
        ArgumentError: an argument is unknown or missing.
    """
    parser = ArgumentParser(
        prog="catp completion",
        usage="catp completion SHELL",
        description=summaries["completion"],
        exit_on_error=False,
    )
    parser.add_argument("shell", choices=SHELLS, help="The shell that reads the script.")
    shell = parsed(parser, args).shell
    parsers: dict[str, argparse.ArgumentParser] = {}
    with redirect_stdout(sys.stderr):  # commands may write progress lines before they parse
        for name, summary in summaries.items():  # without jsonargparse nothing would stop a command: named here
            own = {"completion": lambda _: parser, "recipe": recipe_parser, "league": league_parser}.get(name)
            parsers[name] = capture_parser(run, name) if own is None else own(summary)
    print(script(shell, parsers, summaries))


def script(shell: str, parsers: Mapping[str, argparse.ArgumentParser], summaries: Mapping[str, str]) -> str:
    """Return the script for one of `SHELLS`, given the parser and the summary of each command by its name."""
    # A parser of argparse's own: what jsonargparse would print has the arguments of every LightningModule there is.
    tree = argparse.ArgumentParser(prog="catp")
    tree.add_argument("--version", action="version", version="", help="Print the version and exit.")
    commands = tree.add_subparsers()
    for name, parser in parsers.items():
        told: dict[str, Any] = {"help": summaries[name], "description": summaries[name], "add_help": False}
        if isinstance(parser, ArgumentParser):
            command = commands.add_parser(name, **told)
            _add_all(command, parser)
        else:
            command = commands.add_parser(name, **told, parents=[parser])
            _complete_recipes(command, parsers["sweep"])
    return shtab.complete(tree, shell)


def _add_all(command: argparse.ArgumentParser, parser: argparse.ArgumentParser) -> None:
    """Add to the parser of a command all that another parser has, but for options that the command has already."""
    for action in [*parser._actions, *_arguments_of_defaults(parser)]:
        if command._option_string_actions.keys().isdisjoint(action.option_strings):
            _add(command, action)


def _complete_recipes(command: argparse.ArgumentParser, sweep: argparse.ArgumentParser) -> None:
    """Complete names of recipes where they are run or shown, and the options of a sweep where they are run."""
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for nested in action.choices.values():
                _complete_recipes(nested, sweep)
        elif action.dest in ("name", "run"):
            action.choices = names()
    if "--task" in command._option_string_actions:
        _add_all(command, sweep)


def _add(command: argparse.ArgumentParser, action: argparse.Action) -> None:
    """Add an option or an argument to the parser of a command, with what completes its values."""
    options = [option for option in action.option_strings if not option.endswith("+")]  # which appends to a list
    if action.help == argparse.SUPPRESS or (action.option_strings and not options):
        return
    help_ = (action.help or action.dest).split("\n")[0].replace("%", "%%")
    if action.nargs == 0:
        command.add_argument(*options, action="help", help=help_)
        return
    choices = action.choices or _names_for(options) or _choices(_type(action)) or None
    added: Any = command.add_argument(*options or [action.dest], choices=choices, help=help_)
    if isinstance(action, ConfigFile):
        added.complete = _configurations()
    elif isinstance(action, ActionConfigFile) or not PATHS.isdisjoint(options):
        added.complete = shtab.FILE


def _names_for(options: Sequence[str]) -> Sequence[str]:
    """Return the names that an option takes; none for one that takes something else."""
    scorers = sorted(SCORERS)
    known: dict[str, Sequence[str]] = {
        "--scorer": scorers,
        "--scorers": ["all", "calibrated", *scorers],
        "--reference": ["calibrated", *scorers],
        "--selector": sorted(SELECTORS),
        "--models": SHIPPED,
        "--model.model": SHIPPED,
    }
    return next((known[option] for option in options if option in known), ())


def _configurations() -> dict[str, Any]:
    """Completion of a configuration by the name of a shipped one or as a file, for each shell."""
    shipped = sorted(file.name for file in files("catp_lightning.configs").iterdir() if file.name.endswith(".yaml"))
    function = f'_catp_file_or_shipped() {{ compgen -W "{join(shipped)}" -- "$1"; compgen -f -- "$1"; }}'
    return {
        "bash": "_catp_file_or_shipped",
        "zsh": "_catp_file_or_shipped",
        "fish": f"{join(shipped)} (__fish_complete_path (commandline -ct))",
        "preamble": {
            "bash": function,
            "zsh": f"_catp_file_or_shipped() {{ compadd -- {join(shipped)}; _files }}",
        },
    }


def _arguments_of_defaults(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield actions for the arguments of the classes that `--model` and `--data` name where they are not given."""
    for action in parser._actions:
        default = action.default
        if isinstance(default, dict | Namespace) and (path := default.get("class_path")):
            module, _, name = path.rpartition(".")
            for argument in signature(getattr(sys.modules[module], name)).parameters:
                option = f"{action.option_strings[0]}.{argument}"
                yield argparse.Action([option], option[2:], help=f"Argument of {name}.")


def _type(action: argparse.Action) -> Any:
    """Return the type of an option's values; None for one that has none, or takes the name of a class to explain."""
    explains = any(option.endswith(".help") for option in action.option_strings)
    return None if explains else getattr(action, "_typehint", None)


def _choices(type_: Any) -> list[str]:
    """Return the values of a type that has few, or of the parts of a union that have few; none for other types."""
    if type_ is bool:
        return ["true", "false"]
    if get_origin(type_) is Literal:
        return [str(value) for value in get_args(type_)]
    if get_origin(type_) in (None, list, dict, tuple):
        return []
    return list(dict.fromkeys(value for part in get_args(type_) for value in _choices(part)))
