"""The plot of a sweep: accuracy over visual tokens, a panel for each model."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from catp_lightning.evaluation.comparison import MEASURES, Measure
from catp_lightning.evaluation.sweep.table import ModelTable, Row
from catp_lightning.safe_text import figure_text
from catp_lightning.utils.plots import LOGARITHMIC

GREYS = ("black", "#555555", "#707070", "#878787")
SHADES = (
    *("royalblue", "#d26a00", "forestgreen", "blueviolet", "saddlebrown", "mediumorchid", "olive", "#0097a7"),
    *("navy", "#a87b00", "#23936a", "indigo", "#a07a48", "steelblue", "#6f9500", "#de4f96"),
)
"""Colours of methods: without red, which is the reference's, and grey, the controls'; all have a contrast of at least
3:1 to the light ground of a page (WCAG 2.2, 1.4.11)."""
MARKERS = "osD^v<>ph*PXd"
CAPTION = (
    "Grey, dashed, hollow: controls. Dash-dotted: tokens leave inside the decoder, whose first layers read more;\n"
    "where none stays, the place is how many a layer reads, the mean over all."
)


def figure(tables: Sequence[ModelTable]) -> Figure:
    """Plot accuracy over visual tokens kept, or agreement where the data has no right answers, a panel for each model.

    The reference is thick and crimson, controls are grey and dashed, methods that drop tokens inside the decoder, whose
    first layers read more, are dash-dotted, and the unpruned model is the dotted line. One method looks the same in
    every panel; its place in the legend is its mean at the smallest budgets.
    """
    looks = _looks(tables)
    drawing = Figure(figsize=(1.5 + 6.5 * len(tables), max(5.5, 1.5 + 0.22 * len(looks))), layout="constrained")
    for axes, table in zip(drawing.subplots(1, len(tables), squeeze=False)[0], tables, strict=True):
        _panel(axes, table, looks)
    handles: dict[str, Any] = {}
    for axes in drawing.axes:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    titles = {figure_text(row["method"]): row["method"] for table in tables for row in table.rows}
    order = sorted(handles, key=lambda label: -_height(tables, titles[label]))
    drawing.legend([handles[label] for label in order], order, loc="outside right center", fontsize=9)
    drawing.supxlabel(CAPTION, fontsize=9)
    return drawing


def _panel(axes: Axes, table: ModelTable, looks: Mapping[str, Mapping[str, Any]]) -> None:
    measure: Measure = "accuracy" if table.measured else "agreement"
    full, *rows = table.rows
    axes.axhline(full[measure], color="black", linestyle=":", label=figure_text(full["method"]))
    for title in dict.fromkeys(row["method"] for row in rows):
        found = (row for row in rows if row["method"] == title)
        points = sorted((_place(row), row[measure], *row[f"{measure}_interval"]) for row in found)
        tokens, value, low, high = zip(*points, strict=True)
        look: dict[str, Any] = dict(looks[title])
        if title == table.reference:
            look |= {"linewidth": 3, "color": "crimson", "linestyle": "-", "zorder": 3}
            look |= {"marker": "o", "markerfacecolor": "crimson"}
            axes.fill_between(tokens, low, high, color="crimson", alpha=0.1)
            axes.vlines(tokens, low, high, color="crimson", linewidth=1)  # a band of one budget has no width
        axes.plot(tokens, value, label=figure_text(title), **look)
    axes.set_xscale("log", base=2)
    budgets = {repr(row["keep"]): row["tokens"] for row in rows if row["method"] == table.reference}
    axes.set_xticks(list(budgets.values()), [f"{tokens:.3g}" for tokens in budgets.values()])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.set(
        title=figure_text(table.name),
        xlabel=f"visual tokens kept of a sample, {LOGARITHMIC}",
        ylabel=MEASURES[measure],
    )
    shown = [row[measure] for row in table.rows]
    shown += [end for row in rows if row["method"] == table.reference for end in row[f"{measure}_interval"]]
    axes.set_ylim(max(-0.02, min(shown) - 0.03), min(1.02, max(shown) + 0.03))  # with room for a marker at 0 or 1


def _place(row: Row) -> float:
    """Return a row's place on the token axis: tokens kept, or the mean that a layer reads where no token is kept.

    A logarithmic axis has no place for 0.
    """
    return float(row["tokens"] or row["tokens_per_layer"])


def _looks(tables: Sequence[ModelTable]) -> dict[str, dict[str, Any]]:
    """Return colour, marker and line style of each method, the same in every panel."""
    titles = dict.fromkeys(row["method"] for table in tables for row in table.rows[1:])
    inside = {row["method"] for table in tables for row in table.rows if "tokens_per_layer" in row}
    controls = {row["method"] for table in tables for row in table.rows if row["control"]}
    references = {table.reference for table in tables}
    methods = [title for title in titles if title not in controls | references]
    found: dict[str, dict[str, Any]] = {}
    for title, shade, marker in zip(methods, itertools.cycle(SHADES), itertools.cycle(MARKERS), strict=False):
        style = "-." if title in inside else "-"
        found[title] = {"color": shade, "marker": marker, "linestyle": style, "linewidth": 1.4}
    plain = sorted(controls | references)
    for title, grey, marker in zip(plain, itertools.cycle(GREYS), itertools.cycle(MARKERS), strict=False):
        hollow = {"markerfacecolor": "white", "linestyle": "--", "linewidth": 1.2}
        found[title] = {"color": grey, "marker": marker, **hollow}
    return {title: {**look, "markersize": 6} for title, look in found.items()}


def _height(tables: Sequence[ModelTable], title: str) -> float:
    """Return a method's mean at each table's smallest budget, by which the legend is sorted.

    The unpruned model gets 2.0, above all.
    """
    last = []
    for table in tables:
        measure = "accuracy" if table.measured else "agreement"
        rows = [row for row in table.rows if row["method"] == title]
        if rows and rows[0]["keep"] is None:
            return 2.0
        last += [min(rows, key=lambda row: row["tokens"])[measure]] if rows else []
    return sum(last) / len(last)
