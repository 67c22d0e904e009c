"""A recipe as text: its settings, what was reported, and beside it what a run of the user's found."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from catp_lightning.errors import DataError
from catp_lightning.evaluation.recipes.recipe import Published, Recipe
from catp_lightning.utils.files import read_bytes

Rows = Sequence[Mapping[str, Any]]
"""Rows of a sweep's table."""


def results(recipe: Recipe, output: Path) -> dict[str, Rows]:
    """Return the rows of the tables that a run wrote, by task; tasks that were not run are not there.

    Raises:
        DataError: a table is damaged, or a task was run with several models.
    """
    found: dict[str, Rows] = {}
    for task in recipe.tasks:
        tables = sorted((output / task.name).glob("*/table.json"))
        if len(tables) > 1:
            raise DataError(f"{output / task.name} has results of {len(tables)} models: give each an --output.")
        for table in tables:
            try:
                found[task.name] = json.loads(read_bytes(table))["rows"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(f"{table} is not a sweep's table: {error!r:.200}. Run the task again.") from error
    return found


def yours(
    recipe: Recipe, published: Published, keep: int | float, found: Mapping[str, Rows]
) -> tuple[float, int] | None:
    """Return what a run found where something is published, in percent, and over how many tasks it is the mean.

    None: the method was not run at this budget on the task. Several tasks are meant where the published task is none of
    the recipe's and begins with "mean".
    """
    tasks = [task.name for task in recipe.tasks]
    if published.task in tasks:
        tasks = [published.task]
    elif not published.task.startswith("mean"):
        return None
    measure = "accuracy" if published.measure == "accuracy in %" else "accuracy_share"
    values = [value for task in tasks if (value := _value(found.get(task, ()), published, keep, measure)) is not None]
    return (100 * float(np.mean(values)), len(values)) if values else None


def _value(rows: Rows, published: Published, keep: int | float, measure: str) -> float | None:
    whole = repr(keep) == "1.0"
    for row in rows:
        name = str(row["method"]).partition(" (")[0]
        if (whole and row["keep"] is None) or (name == published.method and repr(row["keep"]) == repr(keep)):
            value = row.get(measure)
            return None if value is None else float(value)
    return None


def lines(recipe: Recipe, found: Mapping[str, Rows]) -> list[tuple[str, ...]]:
    """Return a line for each published figure: task, method, budget, measure, published, yours, source."""
    shown: list[tuple[str, ...]] = []
    for one in recipe.published:
        for keep, value in zip(one.keep, one.values, strict=True):
            own = yours(recipe, one, keep, found)
            several = "" if own is None or own[1] == 1 else f" (mean of {own[1]})"
            mine = "" if own is None else f"{own[0]:.2f}{several}"
            told = "not known" if value is None else f"{value:.2f}"
            at = "unpruned" if repr(keep) == "1.0" else repr(keep)
            shown.append((one.task, one.method, at, one.measure, told, mine, one.source))
    return shown


def settings(recipe: Recipe) -> list[str]:
    """Return the settings of a recipe, a line each."""
    size, trainer = f"about {recipe.parameters:.3g} parameters", dict(recipe.trainer) or "float32"
    told = {
        "setting": f"{recipe.about} ({recipe.source})",
        "model": f"{recipe.model['model']}, {size}, {trainer}",
        "answers": recipe.model.get("generation", "at most 10 tokens, greedily"),
        "budgets": ", ".join(map(repr, recipe.keep)),
        "methods": ", ".join(recipe.scorers) + (" and single layers" if recipe.layers else ""),
    }
    found = [f"{name:8} {value}" for name, value in told.items()]
    for task in recipe.tasks:
        own = task.data["init_args"]
        share = f", a share of {own['fraction']} by seed {own.get('seed', 42)}" if "fraction" in own else ""
        asked = f"{task.questions:,} questions{share}, split {'test' if own.get('test') else 'val'}"
        found.append(f"task     {task.name}: {asked}, prompt {own.get('prompt', 'Question: {} Short answer:')!r}")
    return found + [f"note     {note}" for note in recipe.notes]
