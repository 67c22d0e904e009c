"""Print the tables of docs/results.md from a finished sweep, and draw its plot.

    catp sweep --layers true --output runs/sweep
    python -m benchmarks.sweep_results runs/sweep > runs/sweep/results.md

Each model has a row for each method and a column for each budget: accuracy with its 95% interval and, where a method
has several draws, their spread; then how far *calibrated* is ahead in agreement, with *ahead*, *level* or *behind* by
the interval; then what each calibration chose. `runs/sweep/methods.png` is the sweep's plot without the methods at
single layers, which would hide the others.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from catp_lightning.calibration.report.controls import verdict
from catp_lightning.evaluation.sweep.figure import figure
from catp_lightning.evaluation.sweep.table import ModelTable, kind, over_draws
from catp_lightning.policy import PruningPolicy
from catp_lightning.policy.locations import budget_file_name
from catp_lightning.safe_text import Markdown
from catp_lightning.utils.files import write_bytes
from catp_lightning.utils.markdown import markdown_table
from catp_lightning.utils.plots import png

Row = Mapping[str, Any]
LAYER = re.compile(r" layer \d+$")  # ends the title of a method at a single layer
NEAR = 0.02  # a method that keeps more tokens than the reference by over this share is shown with its tokens


def tables(table: Mapping[str, Any], folder: Path) -> str:
    """Return the tables of one model as Markdown; `table` is the content of its table.json, in `folder`."""
    full, *rows = table["rows"]
    budgets = list(dict.fromkeys(row["keep"] for row in rows))
    methods: dict[str, dict[float, Row]] = {}
    for row in rows:
        methods.setdefault(row["method"], {})[row["keep"]] = row
    order = sorted(methods, key=lambda name: -float(np.mean([row["accuracy"] for row in methods[name].values()])))
    usual = {keep: methods[table["reference"]][keep]["tokens"] for keep in budgets}
    head = ["method", *map(_share, budgets)]
    inside = any("tokens_per_layer" in row for row in rows)
    head += [f"tokens a layer reads, at {_share(budgets[-1])}"] if inside else []
    figures, ahead = [], []
    for name in order:
        by_budget, last = methods[name], methods[name][budgets[-1]]
        title = Markdown((f"**{name}**" if name == table["reference"] else name) + kind(last))
        cells = [_figure(by_budget[keep], usual[keep]) for keep in budgets]
        figures.append([title, *cells, *([f"{last.get('tokens_per_layer', last['tokens']):.0f}"] if inside else [])])
        if name != table["reference"]:
            ahead.append([name, *(_ahead(by_budget[keep]) for keep in budgets)])
    kept = " / ".join(f"{usual[keep]:.0f}" for keep in budgets)
    return (
        f"### {table['model']}\n\nUnpruned: {_interval(full, 'accuracy')}. Tokens kept at the budgets: {kept}.\n\n"
        + markdown_table(head, figures)
        + f"\nHow far *{table['reference']}* is ahead in agreement with the unpruned answers, paired, 95%:\n\n"
        + markdown_table(["method", *map(_share, budgets)], ahead)
        + f"\nWhat calibration chose, draw by draw. {_chosen(folder, budgets)}\n"
    )


def _figure(row: Row, usual: float) -> str:
    several = f", over draws {over_draws(row, 'accuracy')}" if "accuracy_draws" in row else ""
    tokens = f", {row['tokens']:.1f} tokens" if row["tokens"] > (1 + NEAR) * usual else ""
    return f"{_interval(row, 'accuracy')}{several}{tokens}"


def _ahead(row: Row) -> str:
    low, high = row["reference_ahead_interval"]
    return f"{row['reference_ahead']:+.3f} ({low:+.3f} to {high:+.3f}) {verdict((low, high))}"


def _interval(row: Row, measure: str) -> str:
    low, high = row[f"{measure}_interval"]
    return f"{row[measure]:.3f} ({low:.3f} to {high:.3f})"


def _share(keep: float) -> str:
    return str(Fraction(keep).limit_denominator(100)) if isinstance(keep, float) else str(keep)


def _chosen(folder: Path, budgets: Sequence[float]) -> str:
    """Return a text with the choice of each draw, by calibration and budget."""
    found: dict[str, dict[float, list[str]]] = {}
    for place in sorted((folder / "policies").iterdir()):
        name = place.name.partition("-draw-")[0].replace("-", " ", 1)
        for keep in budgets:
            file = place / budget_file_name(keep)
            if file.is_file():
                chosen = PruningPolicy.load(file).evidence["chosen"]
                found.setdefault(name, {}).setdefault(keep, []).append(chosen)
    return " ".join(
        f"*{name}*: {', '.join(f'{_share(keep)}: {_counted(several)}' for keep, several in by_budget.items())}."
        for name, by_budget in found.items()
    )


def _counted(names: Sequence[str]) -> str:
    return "; ".join(
        f"{name} ({names.count(name)} times)" if names.count(name) > 1 else name for name in dict.fromkeys(names)
    )


def plot(tables: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the plot of the sweep as a PNG file, without methods at single layers."""
    shown = [
        ModelTable(
            table["model"],
            table["about"],
            table["reference"],
            [row for row in table["rows"] if not LAYER.search(row["method"])],
        )
        for table in tables
    ]
    return png(figure(shown), dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    files = sorted(folder.glob("*/table.json"))
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    for table, file in zip(found, files, strict=True):
        print(tables(table, file.parent))
    write_bytes(folder / "methods.png", plot(found))


if __name__ == "__main__":
    main()
