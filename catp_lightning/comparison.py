"""Methods side by side on one set of questions: accuracy, agreement with the unpruned model, tokens kept."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from catp_lightning.calibration.figures import LOGARITHMIC, png
from catp_lightning.files import write_bytes, write_json, write_text

RESAMPLES = 2000

Measure = Literal["accuracy", "agreement"]
MEASURES: dict[Measure, str] = {"accuracy": "VQA accuracy", "agreement": "agreement with the unpruned model"}


@dataclass(frozen=True)
class Result:
    """One method at one budget, question by question.

    Attributes:
        method: its name; several results of one name and budget (seeds) are averaged question by question.
        keep: the budget; None: unpruned.
        score: float [N], VQA accuracy of each question, in [0, 1]; None where it was not measured.
        same: float [N], 1 where the answer is the unpruned model's.
        tokens: mean visual tokens kept.
        tokens_per_layer: mean visual tokens that a layer of the decoder reads; None: as many as are kept.
    """

    method: str
    keep: int | float | None
    score: np.ndarray | None
    same: np.ndarray
    tokens: float
    tokens_per_layer: float | None = None


@dataclass
class Comparison:
    """Results of several methods on the same questions.

    Attributes:
        images: [N], the image each question is about: intervals resample images, for two questions about one are no
            two samples.
        reference: the method the others are compared with.
    """

    images: Sequence[int]
    reference: str
    results: list[Result] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each method and budget: means, 95% bootstrap intervals, how far the reference is ahead, paired."""
        merged: dict[tuple[str, str], list[Result]] = {}
        for result in self.results:
            merged.setdefault((result.method, repr(result.keep)), []).append(result)  # 1 and 1.0 are two budgets
        means = {key: _mean(several) for key, several in merged.items()}
        weights = self._resamples()
        return [self._row(mean, means, weights) for mean in means.values()]

    def _row(self, mean: Result, means: Mapping[tuple[str, str], Result], weights: np.ndarray) -> dict[str, Any]:
        score, same = mean.score, mean.same
        row: dict[str, Any] = {"method": mean.method, "keep": mean.keep, "tokens": mean.tokens}
        if mean.tokens_per_layer is not None:
            row["tokens_per_layer"] = mean.tokens_per_layer
        if score is not None:
            row |= {"accuracy": float(score.mean()), "accuracy_interval": _interval(weights @ score)}
        row |= {"agreement": float(same.mean()), "agreement_interval": _interval(weights @ same)}
        reference = means.get((self.reference, repr(mean.keep)))
        if reference is not None and mean.method != self.reference:
            difference = reference.same - same
            row["reference_ahead"] = float(difference.mean())
            row["reference_ahead_interval"] = _interval(weights @ difference)
        return row

    def _resamples(self) -> np.ndarray:
        """Weights of the questions in each bootstrap resample of the images: float [RESAMPLES, N], rows sum to 1."""
        _, image = np.unique(np.asarray(self.images), return_inverse=True)
        count = image.max() + 1
        drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES)
        weights = drawn[:, image].astype(float)
        return weights / weights.sum(1, keepdims=True)


def _mean(several: Sequence[Result]) -> Result:
    """Of a method's seeds, question by question."""
    scores = [result.score for result in several if result.score is not None]
    per_layer = [result.tokens_per_layer for result in several if result.tokens_per_layer is not None]
    return Result(
        several[0].method,
        several[0].keep,
        np.mean(scores, 0) if scores else None,
        np.mean([result.same for result in several], 0),
        float(np.mean([result.tokens for result in several])),
        float(np.mean(per_layer)) if per_layer else None,
    )


def _interval(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.quantile(values, [0.025, 0.975])]


def markdown(rows: Sequence[Mapping[str, Any]], reference: str) -> str:
    """Two tables with a row for each method: figures at every budget, and how far the reference is ahead, paired."""
    budgets, methods = _axes(rows)
    at = {(row["method"], row["keep"]): row for row in rows}
    unpruned = {method: row for (method, keep), row in at.items() if keep is None}
    head = [f"keep {keep}: {name}" for keep in budgets for name in _columns(rows)]
    figures, ahead = [], []
    for method in methods:
        cells = [cell for keep in budgets for cell in _cells(at.get((method, keep)) or unpruned[method])]
        figures.append([method, *cells])
        if method != reference and method not in unpruned:
            ahead.append([method, *(_ahead(at[method, keep]) for keep in budgets)])
    return (
        markdown_table(["method", *head], figures)
        + f"\nHow far *{reference}* is ahead in agreement, paired by question, 95% interval:\n\n"
        + markdown_table(["method", *(f"keep {keep}" for keep in budgets)], ahead)
    )


def console_tables(rows: Sequence[Mapping[str, Any]], reference: str) -> list[Table]:
    """The figures for the terminal, a table for each budget: together they would be too wide."""
    tables = []
    for keep in _axes(rows)[0]:
        table = Table("method", *_columns(rows), title=f"keep {keep}", title_justify="left")
        for row in rows:
            if row["keep"] in (None, keep):
                table.add_row(row["method"], *_cells(row), style="bold" if row["method"] == reference else None)
        tables.append(table)
    return tables


def _axes(rows: Sequence[Mapping[str, Any]]) -> tuple[list[int | float], list[str]]:
    """Budgets and methods, each once, in the order of the rows."""
    budgets = dict.fromkeys(row["keep"] for row in rows if row["keep"] is not None)
    return list(budgets), list(dict.fromkeys(row["method"] for row in rows))


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [*(["accuracy"] if "accuracy" in rows[0] else []), "agreement (95%)", "tokens"]


def _cells(row: Mapping[str, Any]) -> list[str]:
    low, high = row["agreement_interval"]
    accuracy = [f"{row['accuracy']:.3f}"] if "accuracy" in row else []
    return [*accuracy, f"{row['agreement']:.3f} ({low:.3f} to {high:.3f})", f"{row['tokens']:.0f}"]


def _ahead(row: Mapping[str, Any]) -> str:
    low, high = row["reference_ahead_interval"]
    return f"{row['reference_ahead']:+.3f} ({low:+.3f} to {high:+.3f})"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """
    >>> print(markdown_table(["keep", "tokens"], [["0.5", "16"]]), end="")
    | keep | tokens |
    | --- | --- |
    | 0.5 | 16 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def figure(rows: Sequence[Mapping[str, Any]], reference: str, measure: Measure = "accuracy") -> Figure:
    """Accuracy or agreement over visual tokens kept, a line for each method; the unpruned model is the dotted line."""
    drawing = Figure(figsize=(8, 5), layout="constrained")
    axes = drawing.subplots()
    for row in rows:
        if row["keep"] is None:
            axes.axhline(row[measure], color="black", linestyle=":", label=row["method"])
    methods = list(dict.fromkeys(row["method"] for row in rows if row["keep"] is not None))
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, len(methods)))
    for method, shade, marker in zip(methods, shades, itertools.cycle("os^vDPX<>*dp")):
        found = (row for row in rows if row["method"] == method)
        points = sorted((row["tokens"], row[measure], *row[f"{measure}_interval"]) for row in found)
        tokens, value, low, high = zip(*points, strict=True)
        if method == reference:
            axes.plot(tokens, value, marker="o", linewidth=3, color="crimson", label=method)
            axes.fill_between(tokens, low, high, color="crimson", alpha=0.15)
            axes.vlines(tokens, low, high, color="crimson", linewidth=1)  # a band of one budget has no width
        else:
            axes.plot(tokens, value, marker=marker, linewidth=1.2, color=shade, label=method)
    axes.set_xscale("log", base=2)
    ticks = sorted({row["tokens"] for row in rows if row["keep"] is not None})
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel=f"visual tokens kept of each image, {LOGARITHMIC}", ylabel=MEASURES[measure], ylim=(0, 1.02))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing


def save_comparison(comparison: Comparison, folder: Path, title: str) -> list[dict[str, Any]]:
    """Write `table.md`, `table.json` and `accuracy.png`; returns the rows."""
    rows = comparison.rows()
    write_text(folder / "table.md", f"# {title}\n\n{markdown(rows, comparison.reference)}")
    write_json(folder / "table.json", {"title": title, "reference": comparison.reference, "rows": rows}, indent=2)
    write_bytes(folder / "accuracy.png", png(figure(rows, comparison.reference), dpi=120))
    return rows
