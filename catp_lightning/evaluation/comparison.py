"""Comparison of methods on one set of questions: accuracy, agreement with the unpruned model, tokens kept."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from catp_lightning.safe_text import figure_text, markdown_text, rich_text
from catp_lightning.utils.files import write_bytes, write_json, write_text
from catp_lightning.utils.markdown import markdown_table
from catp_lightning.utils.plots import LOGARITHMIC, png

RESAMPLES = 2000

Measure = Literal["accuracy", "agreement"]
MEASURES: dict[Measure, str] = {"accuracy": "VQA accuracy", "agreement": "agreement with the unpruned model"}


@dataclass(frozen=True)
class Result:
    """Result of one method at one budget, for each of N questions.

    Attributes:
        method: name of the method; several results of one name and budget are draws of one method (seeds, or
            calibrations on different data) and are averaged question by question.
        keep: the budget; None: unpruned.
        score: float [N], VQA accuracy of each question, in [0, 1]; None where it was not measured.
        same: float [N], 1 where the answer is the unpruned model's, otherwise 0.
        tokens: mean number of visual tokens kept.
        tokens_per_layer: mean number of visual tokens that a layer of the decoder reads; None: as many as are kept.
    """

    method: str
    keep: int | float | None
    score: np.ndarray | None
    same: np.ndarray
    tokens: float
    tokens_per_layer: float | None = None


@dataclass
class Comparison:
    """Results of several methods on the same N questions.

    Attributes:
        images: [N], the image each question is about: intervals resample images, for questions about one image are not
            independent samples.
        reference: the method the others are compared with.
        results: results of the methods, several for one that has several draws.
    """

    images: Sequence[int]
    reference: str
    results: list[Result] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each method and budget.

        A row has means, 95% bootstrap intervals, and how far the reference is ahead in agreement, paired by question.
        Where a method has several draws, intervals resample them as well as images, and `agreement_draws`
        (`accuracy_draws`) has the mean of each.
        """
        merged: dict[tuple[str, str], list[Result]] = {}
        for result in self.results:
            merged.setdefault((result.method, repr(result.keep)), []).append(result)  # 1 and 1.0 are two budgets
        weights = self._resamples()
        groups = {key: _Draws.of(several, weights, number) for number, (key, several) in enumerate(merged.items())}
        return [self._row(draws, groups) for draws in groups.values()]

    def _row(self, draws: "_Draws", groups: Mapping[tuple[str, str], "_Draws"]) -> dict[str, Any]:
        mean = draws.results[0]
        row: dict[str, Any] = {"method": mean.method, "keep": mean.keep}
        row["tokens"] = float(np.mean([result.tokens for result in draws.results]))
        per_layer = [result.tokens_per_layer for result in draws.results if result.tokens_per_layer is not None]
        if per_layer:
            row["tokens_per_layer"] = float(np.mean(per_layer))
        for measure, means, resampled in (
            ("accuracy", draws.accuracy, draws.resampled_accuracy),
            ("agreement", draws.agreement, draws.resampled_agreement),
        ):
            if means is not None and resampled is not None:
                row |= {measure: float(np.mean(means)), f"{measure}_interval": _interval(resampled)}
                row |= {f"{measure}_draws": means} if len(means) > 1 else {}
        reference = groups.get((self.reference, repr(mean.keep)))
        if reference is not None and mean.method != self.reference:
            row["reference_ahead"] = float(np.mean(reference.agreement) - np.mean(draws.agreement))
            row["reference_ahead_interval"] = _interval(reference.resampled_agreement - draws.resampled_agreement)
        return row

    def _resamples(self) -> np.ndarray:
        """Return weights of the questions in each bootstrap resample of images: float [RESAMPLES, N], rows sum to 1."""
        _, image = np.unique(np.asarray(self.images), return_inverse=True)
        count = image.max() + 1
        drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES)
        weights = drawn[:, image].astype(float)
        return weights / weights.sum(1, keepdims=True)


@dataclass(frozen=True)
class _Draws:
    """Draws of one method at one budget: the mean of each, and bootstrap means that resample images and draws.

    Attributes:
        results: one result for each draw.
        agreement, accuracy: the mean of each draw; accuracy is None where it was not measured.
        resampled_agreement, resampled_accuracy: float [RESAMPLES], weighted means over draws and questions.
    """

    results: Sequence[Result]
    agreement: list[float]
    resampled_agreement: np.ndarray
    accuracy: list[float] | None
    resampled_accuracy: np.ndarray | None

    @classmethod
    def of(cls, results: Sequence[Result], weights: np.ndarray, number: int) -> "_Draws":
        """Resample results of one method and budget; `weights` of questions: float [RESAMPLES, N], `number`: a seed."""
        shares = _draw_shares(len(results), number)

        def resampled(values: Sequence[np.ndarray]) -> np.ndarray:
            return np.asarray((shares * (weights @ np.stack(values, 1))).sum(1))

        same = [result.same for result in results]
        scores = [result.score for result in results if result.score is not None]
        return cls(
            results,
            [float(one.mean()) for one in same],
            resampled(same),
            [float(one.mean()) for one in scores] if len(scores) == len(results) else None,
            resampled(scores) if len(scores) == len(results) else None,
        )


def _draw_shares(draws: int, number: int) -> np.ndarray:
    """Return the share of each draw in each resample: float [RESAMPLES, draws], rows sum to 1; `number` is the seed.

    Deviations from equal shares are enlarged by sqrt(n / (n - 1)): a bootstrap of few draws understates their variance
    by that much.
    """
    if draws == 1:
        return np.ones((RESAMPLES, 1))
    drawn = np.random.default_rng([1, number]).multinomial(draws, np.full(draws, 1 / draws), RESAMPLES) / draws
    return np.asarray(1 / draws + (draws / (draws - 1)) ** 0.5 * (drawn - 1 / draws))


def _interval(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.quantile(values, [0.025, 0.975])]


def markdown(rows: Sequence[Mapping[str, Any]], reference: str) -> str:
    """Return two Markdown tables with a row for each method.

    They have the figures at every budget, and how far the reference is ahead in agreement, paired by question.
    """
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
        + f"\nHow far *{markdown_text(reference)}* is ahead in agreement, paired by question, 95% interval:\n\n"
        + markdown_table(["method", *(f"keep {keep}" for keep in budgets)], ahead)
    )


def console_tables(rows: Sequence[Mapping[str, Any]], reference: str) -> list[Table]:
    """Return the figures as tables for the terminal, one for each budget: a single table would be too wide."""
    tables = []
    for keep in _axes(rows)[0]:
        table = Table("method", *_columns(rows), title=f"keep {keep}", title_justify="left")
        for row in rows:
            if row["keep"] in (None, keep):
                style = "bold" if row["method"] == reference else None
                table.add_row(rich_text(row["method"]), *_cells(row), style=style)
        tables.append(table)
    return tables


def _axes(rows: Sequence[Mapping[str, Any]]) -> tuple[list[int | float], list[str]]:
    """Return budgets and methods, each once, in the order of the rows."""
    budgets = dict.fromkeys(row["keep"] for row in rows if row["keep"] is not None)
    return list(budgets), list(dict.fromkeys(row["method"] for row in rows))


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [*(["accuracy"] if "accuracy" in rows[0] else []), "agreement (95%)", "tokens"]


def _cells(row: Mapping[str, Any]) -> list[str]:
    low, high = row["agreement_interval"]
    accuracy = [f"{row['accuracy']:.3f}"] if "accuracy" in row else []
    agreement = f"{row['agreement']:.3f} ({low:.3f} to {high:.3f})"
    draws = f"; draws {over_draws(row, 'agreement')}" if "agreement_draws" in row else ""
    return [*accuracy, agreement + draws, f"{row['tokens']:.0f}"]


def over_draws(row: Mapping[str, Any], measure: Measure) -> str:
    """Return standard deviation and range of a row's draws as text; "" where there is one draw.

    >>> over_draws({"agreement_draws": [0.93, 0.95, 0.94]}, "agreement"), over_draws({}, "agreement")
    ('± 0.010 (0.930 to 0.950)', '')
    """
    draws = row.get(f"{measure}_draws", [])
    return f"± {np.std(draws, ddof=1):.3f} ({min(draws):.3f} to {max(draws):.3f})" if len(draws) > 1 else ""


def _ahead(row: Mapping[str, Any]) -> str:
    low, high = row["reference_ahead_interval"]
    return f"{row['reference_ahead']:+.3f} ({low:+.3f} to {high:+.3f})"


def figure(rows: Sequence[Mapping[str, Any]], reference: str, measure: Measure = "accuracy") -> Figure:
    """Plot accuracy or agreement over visual tokens kept, a line for each method; the unpruned model's is dotted."""
    drawing = Figure(figsize=(8, 5), layout="constrained")
    axes = drawing.subplots()
    for row in rows:
        if row["keep"] is None:
            axes.axhline(row[measure], color="black", linestyle=":", label=figure_text(row["method"]))
    methods = list(dict.fromkeys(row["method"] for row in rows if row["keep"] is not None))
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, len(methods)))
    for method, shade, marker in zip(methods, shades, itertools.cycle("os^vDPX<>*dp")):
        found = (row for row in rows if row["method"] == method)
        points = sorted((row["tokens"], row[measure], *row[f"{measure}_interval"]) for row in found)
        tokens, value, low, high = zip(*points, strict=True)
        if method == reference:
            axes.plot(tokens, value, marker="o", linewidth=3, color="crimson", label=figure_text(method))
            axes.fill_between(tokens, low, high, color="crimson", alpha=0.15)
            axes.vlines(tokens, low, high, color="crimson", linewidth=1)  # a band of one budget has no width
        else:
            axes.plot(tokens, value, marker=marker, linewidth=1.2, color=shade, label=figure_text(method))
    axes.set_xscale("log", base=2)
    ticks = sorted({row["tokens"] for row in rows if row["keep"] is not None})
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel=f"visual tokens kept of each image, {LOGARITHMIC}", ylabel=MEASURES[measure], ylim=(0, 1.02))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing


def save_comparison(comparison: Comparison, folder: Path, title: str) -> list[dict[str, Any]]:
    """Write `table.md`, `table.json` and `accuracy.png` to `folder`; returns the rows."""
    rows = comparison.rows()
    write_text(folder / "table.md", f"# {markdown_text(title)}\n\n{markdown(rows, comparison.reference)}")
    write_json(folder / "table.json", {"title": title, "reference": comparison.reference, "rows": rows}, indent=2)
    write_bytes(folder / "accuracy.png", png(figure(rows, comparison.reference), dpi=120))
    return rows
