"""The plot of a sweep at equal prices: disagreement over the price, a row for each model, a panel for each unit."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from catp_lightning.evaluation.sweep.figure import GREYS, MARKERS, SHADES
from catp_lightning.evaluation.sweep.methods import CALIBRATED
from catp_lightning.evaluation.sweep.priced_table import PricedTable
from catp_lightning.evaluation.sweep.prices import UNIT_NAMES
from catp_lightning.evaluation.sweep.table import Row
from catp_lightning.safe_text import figure_text
from catp_lightning.utils.plots import BESIDE, LOGARITHMIC

SPREAD = 0.34  # octaves to each side of a price in which methods that pay the same stand side by side
LINEAR = 0.02  # disagreement below which the axis is linear, as 0 has no place on a logarithmic one
CAPTION = (
    "Markers stand side by side around the price that they paid; bars are 95% intervals. Lines: what is calibrated.\n"
    "Grey, hollow: controls. The legend is in the order of mean disagreement."
)


def priced_figure(tables: Sequence[PricedTable]) -> Figure:
    """Plot disagreement with the unpruned model over the price that was paid, of every method, with intervals.

    The reference is crimson, other calibrated methods have lines too, controls are grey and hollow. One method looks
    the same in every panel.
    """
    units = list(dict.fromkeys(unit for table in tables for budget in table.budgets for unit in budget))
    looks = _looks(tables)
    size = (3.2 + 5.8 * len(units), max(4.8 * len(tables), 1.2 + 0.2 * len(looks)))
    drawing = Figure(figsize=size, layout="constrained")
    grid = drawing.subplots(len(tables), len(units), squeeze=False)
    for line, table in zip(grid, tables, strict=True):
        for axes, unit in zip(line, units, strict=True):
            _panel(axes, table, unit, looks)
    handles: dict[str, Any] = {}
    for axes in drawing.axes:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    order = [label for title in looks if (label := figure_text(title)) in handles]
    drawing.legend([handles[label] for label in order], order, loc="outside right center", fontsize=8)
    drawing.supxlabel(CAPTION, fontsize=9)
    return drawing


def _panel(axes: Axes, table: PricedTable, unit: str, looks: Mapping[str, Mapping[str, Any]]) -> None:
    shares = sorted({budget[unit] for budget in table.budgets if unit in budget})
    axes.set_title(figure_text(table.name))
    if not shares:
        axes.text(0.5, 0.5, "no method can pay the price", ha="center", va="center", transform=axes.transAxes)
        return
    titles = [title for title in looks if any(row["method"] == title for row in table.rows[1:])]
    beside = [title for title in titles if title != table.reference]
    places = dict(zip(beside, np.linspace(-SPREAD, SPREAD, max(len(beside), 2)), strict=False))
    for title in titles:
        found = [row for row in table.rows if row["method"] == title and unit in row.get("budget", {})]
        if not found:
            continue
        points = sorted((row["prices"][unit] * 2 ** places.get(title, 0.0), *_disagreement(row)) for row in found)
        price, value, low, high = np.array(points).T
        look: dict[str, Any] = dict(looks[title])
        if title == table.reference:
            look |= {"color": "crimson", "linewidth": 2.5, "linestyle": "-", "markersize": 7, "zorder": 4}
            look |= {"marker": "o", "markerfacecolor": "crimson"}
        bars = np.clip([value - low, high - value], 0, None)
        axes.errorbar(price, value, bars, label=figure_text(title), elinewidth=0.8, gid=BESIDE, **look)
    for share in shares:
        axes.axvspan(
            share * 2 ** -(SPREAD + 0.05), share * 2 ** (SPREAD + 0.05), color="black", alpha=0.04, linewidth=0
        )
    axes.set_xscale("log", base=2)
    paid = [*shares, *(row["prices"][unit] for row in table.rows[1:] if unit in row["budget"])]
    axes.set_xlim(min(paid) * 2**-0.75, max(paid) * 2**0.75)
    axes.set_xticks(shares, [f"{share:g}" for share in shares])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yscale("symlog", linthresh=LINEAR, linscale=0.4)
    ticks = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(-0.002, 1.05)
    axes.minorticks_off()
    axes.grid(alpha=0.25, axis="y")
    axes.set(
        xlabel=f"paid, a share of the unpruned model's {UNIT_NAMES[unit]},\n{LOGARITHMIC}",
        ylabel=f"disagreement with the unpruned model,\n{LOGARITHMIC} from {LINEAR} on",
    )


def _disagreement(row: Row) -> tuple[float, float, float]:
    low, high = row["agreement_interval"]
    return 1 - row["agreement"], 1 - high, 1 - low


def _looks(tables: Sequence[PricedTable]) -> dict[str, dict[str, Any]]:
    """Return colour, marker and line of each method, those that disagree least first."""
    rows = [row for table in tables for row in table.rows[1:]]
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["method"], []).append(1 - row["agreement"])
    controls = {row["method"] for row in rows if row["control"]}
    shades, greys, markers = itertools.cycle(SHADES), itertools.cycle(GREYS), itertools.cycle(MARKERS)
    found: dict[str, dict[str, Any]] = {}
    for title in sorted(values, key=lambda title: float(np.mean(values[title]))):
        look: dict[str, Any] = {"marker": next(markers), "linestyle": "none", "markersize": 5}
        if title in controls:
            look |= {"color": next(greys), "markerfacecolor": "white"}
        else:
            look |= {"color": next(shades)}
        if title.startswith(CALIBRATED):
            look |= {"linestyle": "-", "linewidth": 1.4, "zorder": 3}
        found[title] = look
    return found
