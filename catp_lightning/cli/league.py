"""Command line of `catp league`: runs all methods over recipes into submissions, and writes the page of all of them."""

import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from jsonargparse import ArgumentError

from catp_lightning.cli.lists import listed
from catp_lightning.cli.recipe import DATA, Parser, add_run_options, run_recipe, tasks_of
from catp_lightning.evaluation.league import Submission, league_json, league_page, read_all, written
from catp_lightning.evaluation.recipes import Recipe, names, read
from catp_lightning.evaluation.recipes.estimate import require_files
from catp_lightning.safe_text import one_line
from catp_lightning.utils.files import read_bytes, require_writable, write_text
from catp_lightning.utils.progress import Preparation

FOLDER, PAGE, RESULTS, JSON = "league", "docs/league.md", "runs/league", "league.json"


def league_parser(summary: str) -> Parser:
    """Return the parser of `catp league`."""
    parser = Parser("catp league", description=summary, allow_abbrev=False)
    parser.epilog = "Beside --run all other options are those of `catp sweep`: --keep, --scorers, --calibration_draws."
    parser.add_argument(
        "--run", help="recipes to run with all methods, '[digits-blip2]'; without it the page is written"
    )
    parser.add_argument("--folder", default=FOLDER, help=f"folder of submissions; by default {FOLDER}")
    parser.add_argument("--output", default=PAGE, help=f"the page, by default {PAGE}; {JSON} goes into --folder")
    help_ = "true: write nothing, and end with status 1 if the page is not what the folders say"
    parser.add_argument("--check", choices=("true", "false"), default="false", help=help_)
    add_run_options(parser)
    parser.add_argument("--results", default=RESULTS, help=f"folder of the runs' own results; by default {RESULTS}")
    parser.add_argument("--machine", help="what it runs on, in words; by default what the system says")
    return parser


def league(args: list[str], summary: str, preparation: Preparation) -> None:
    """Run `catp league`; `args` are the arguments after `league`.

    Raises:
        SystemExit: 1 if `--check true` finds that the page is not what the folders say.
    """
    chosen, more = league_parser(summary).parse_known_args(args)
    folder = Path(chosen.folder)
    if not chosen.run:
        of_runs = [name for name in ("task", "model", "machine") if getattr(chosen, name) is not None]
        if more or of_runs:
            unknown = [*more, *(f"--{name}" for name in of_runs)]
            raise ArgumentError(None, f"{' '.join(unknown)} needs --run, which names the recipes to run.")
        preparation.end()
        _page(folder, Path(chosen.output), chosen.check == "true")
        return
    recipes = [read(name) for name in listed(chosen.run)]
    data, results = Path(chosen.data or DATA), Path(chosen.results)
    require_writable(folder, folder=True)
    for recipe in recipes:
        require_files(recipe, tasks_of(recipe, chosen.task), data)  # of all of them, before the first is run
    for recipe in recipes:
        _run(recipe, chosen.task, data, chosen.model, results / recipe.name, folder, chosen.machine, more, preparation)


def _run(
    recipe: Recipe,
    asked: Sequence[str] | None,
    data: Path,
    model: str | None,
    results: Path,
    folder: Path,
    machine: str | None,
    more: Sequence[str],
    preparation: Preparation,
) -> None:
    """Run all methods over the tasks of a recipe, and write a submission for each."""
    options = list(more) if any(option.startswith("--scorers") for option in more) else ["--scorers", "all", *more]
    for task in tasks_of(recipe, asked):
        found = run_recipe(recipe, [task], data, model, results, options, preparation)
        table = found[task.name]
        day = datetime.now(UTC).date()
        submission = Submission.of(table, recipe.name, task.name, machine or _machine(), day)
        place = written(submission, results / task.name / table.name, folder)
        print(one_line(f"Submission: {place}. `catp league` writes the page."))


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} processors"


def _page(folder: Path, output: Path, check: bool) -> None:
    recipes = [read(name) for name in names()]
    submissions = read_all(folder)
    page = league_page(submissions, recipes)
    found = json.dumps(league_json(submissions, recipes), indent=1, allow_nan=False) + "\n"
    wanted = {output: page, folder / JSON: found}
    if check:
        other = [file for file, text in wanted.items() if not file.is_file() or read_bytes(file) != text.encode()]
        for file in other:
            print(one_line(f"{file} is not what the folders in {folder} say: run `catp league`."))
        if other:
            raise SystemExit(1)
        return
    for file, text in wanted.items():
        write_text(file, text)
    print(one_line(f"{len(submissions)} submissions: {output}, {folder / JSON}"))
