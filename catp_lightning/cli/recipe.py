"""Command line of `catp recipe`: lists published settings, shows one, and runs it as a sweep."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentError

from catp_lightning.cli.lists import budgets, listed
from catp_lightning.evaluation.recipes import Recipe, Task, names, read
from catp_lightning.evaluation.recipes.shown import lines, results, settings
from catp_lightning.evaluation.sweep.table import ModelTable
from catp_lightning.safe_text import one_line
from catp_lightning.utils.files import require_writable, write_text
from catp_lightning.utils.progress import Preparation

OUTPUT, DATA = "runs/recipes", "data"
SWEEP = "Compare methods on the tasks of a recipe."


class Parser(argparse.ArgumentParser):
    """Parser whose errors are raised, as those of the other commands are."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(None, message)


def recipe_parser(summary: str) -> Parser:
    """Return the parser of `catp recipe`."""
    parser = Parser("catp recipe", description=summary, allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|show|run", parser_class=Parser)
    actions.add_parser("list", help="the recipes that come with the package")
    show = actions.add_parser("show", help="settings, published figures, and yours", allow_abbrev=False)
    run = actions.add_parser("run", help="compare methods on the tasks of a recipe", allow_abbrev=False)
    run.epilog = "All other options are those of `catp sweep`: --keep, --scorers, --trainer.devices, --data.batch_size."
    for one in (show, run):
        one.add_argument("name", help="a recipe, or a YAML file of your own")
        one.add_argument("--output", help=f"folder of results; by default {OUTPUT}/NAME")
    add_run_options(run)
    run.add_argument("--dry-run", action="store_true", help="say what would be read and loaded, and how long it takes")
    return parser


def recipe(args: list[str], summary: str, preparation: Preparation) -> None:
    """Run `catp recipe`; `args` are the arguments after `recipe`."""
    chosen, more = recipe_parser(summary).parse_known_args(args)
    if chosen.action != "run" and more:
        raise ArgumentError(None, f"unrecognized arguments: {' '.join(more)}")
    if chosen.action == "list":
        preparation.end()
        _list()
        return
    found = read(chosen.name)
    output = Path(chosen.output or Path(OUTPUT, found.name))
    if chosen.action == "show":
        preparation.end()
        _show(found, output)
    elif chosen.dry_run:
        preparation.end()
        _dry_run(found, tasks_of(found, chosen.task), Path(chosen.data), chosen.model, more)
    else:
        run_recipe(found, tasks_of(found, chosen.task), Path(chosen.data), chosen.model, output, more, preparation)
        _show(found, output)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what of a recipe is run, and on what."""
    parser.add_argument("--task", action="append", help="a task, or several as '[gqa, mme]'; all by default")
    parser.add_argument("--model", help="another model of the same class, a folder or a name, with its processor")
    parser.add_argument("--data", default=DATA, help=f"folder that the recipe's files are in; by default {DATA}")


def tasks_of(recipe: Recipe, asked: Sequence[str] | None) -> list[Task]:
    """Return the tasks that were asked for, all by default."""
    return [recipe.task(name) for one in asked for name in listed(one)] if asked else list(recipe.tasks)


def run_recipe(
    recipe: Recipe,
    tasks: Sequence[Task],
    folder: Path,
    model: str | None,
    output: Path,
    more: Sequence[str],
    preparation: Preparation,
) -> dict[str, ModelTable]:
    """Sweep over the tasks of a recipe, each with an output of its own, and return their tables by task.

    Args:
        recipe: the recipe.
        tasks: those of its tasks to run.
        folder: folder of data.
        model: another model; None: the recipe's.
        output: folder that gets one for each task, with the configuration of its sweep, `sweep.yaml`.
        more: further options of `catp sweep`.
        preparation: over when the first question is read.

    Raises:
        DataError: files are not there.
    """
    from catp_lightning.cli.sweep import sweep  # takes long, and the other actions need none of it
    from catp_lightning.evaluation.recipes.estimate import require_files

    require_files(recipe, tasks, folder)
    require_writable(output, folder=True)
    found = {}
    for task in tasks:
        place = output / task.name
        text = yaml.safe_dump(recipe.configuration(task, folder, model), sort_keys=False)
        file = write_text(place / "sweep.yaml", text)
        (found[task.name],) = sweep(["--config", str(file), "--output", str(place), *more], SWEEP, preparation)
    return found


def _list() -> None:
    rows = [("recipe", "tasks", "budgets", "setting")]
    for recipe in map(read, names()):
        rows.append((recipe.name, str(len(recipe.tasks)), ", ".join(map(repr, recipe.keep)), recipe.about))
    print(_aligned(rows))


def _show(recipe: Recipe, output: Path) -> None:
    for line in settings(recipe):
        print(one_line(line))
    found = results(recipe, output)
    told = lines(recipe, found)
    if told:
        print(_aligned([("task", "method", "keep", "measure", "published", "yours", "source"), *told]))
    for task in recipe.tasks:
        tables = sorted((output / task.name).glob("*/table.md"))
        where = tables[0] if tables else f"not run: catp recipe run {recipe.name} --task {task.name}"
        print(one_line(f"{task.name}: {where}"))


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text with their columns below each other, in lines of whatever length."""
    shown = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown
    )


def _dry_run(recipe: Recipe, tasks: Sequence[Task], folder: Path, model: str | None, more: Sequence[str]) -> None:
    from catp_lightning.evaluation.recipes.estimate import ASSUMED, duration, jobs, seconds, size_of

    name = model or recipe.model["model"]
    size = size_of(recipe, name)
    source = "counted from its config" if size.counted else "as the recipe says: its config is not on this machine"
    weights = f"{size.weights / 2**30:.2f} GiB of weights, {size.bytes_each} bytes each"
    told = [
        f"model   {name}: {size.parameters:.4g} parameters, {source}",
        f"memory  {weights}; a batch's activations and cache come on top",
    ]
    options = _sweep_options(more)
    scorers = listed(options.scorers) if options.scorers else list(recipe.scorers)
    keep = budgets(options.keep) if options.keep else list(recipe.keep)
    total, count = 0.0, jobs(scorers, len(keep), options.calibration_draws)
    for task in tasks:
        asked = _asked(task, options.fraction)
        takes = seconds(recipe, asked, size, count)
        total += takes
        told.append(f"task    {task.name}: {asked.questions:,} questions, at most {count} jobs, {duration(takes)}")
        told += [f"        {'there  ' if place.exists() else 'MISSING'} {place}" for place in task.places(folder)]
    for line in [*told, f"in all  about {duration(total)}", *ASSUMED.splitlines()]:
        print(one_line(line))


def _asked(task: Task, fraction: float | None) -> Task:
    """Return a task with as many questions as another share of them are; None: its own."""
    if fraction is None:
        return task
    whole = task.questions / task.data["init_args"].get("fraction", 1.0)
    return replace(task, questions=max(1, round(whole * fraction)))


def _sweep_options(more: Sequence[str]) -> Any:
    """Return the options of a sweep that its time depends on."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--scorers")
    parser.add_argument("--keep")
    parser.add_argument("--calibration_draws", type=int, default=1)
    parser.add_argument("--data.fraction", "--data.init_args.fraction", type=float, dest="fraction")
    return parser.parse_known_args(list(more))[0]
