"""Draw the figures of a calibration from the evidence of its policies; None if there is nothing to draw."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from catp_lightning.calibration.report.evidence import budget_name, checked, evidence_of, fits, visual_tokens
from catp_lightning.methods.budget import keep_count
from catp_lightning.policy import PruningPolicy
from catp_lightning.safe_text import figure_text
from catp_lightning.utils.plots import BESIDE, LOGARITHMIC, WRITTEN, heatmap

CONTROLS = {"random": "s", "stride": "^", "grid": "P", "l2-norm": "v", "diversity of outputs": "D"}
"""Controls that the retention figure shows, and their markers."""

AGREEMENT = "share of answers as the unpruned model's"
CHOSEN = "crimson"
DARKER = 0.55
"""Part of the colour map viridis, from its dark end, that has a contrast of 3:1 at least to a light page."""


def retention_figure(policies: Sequence[PruningPolicy]) -> Figure | None:
    """Plot agreement with the unpruned model over visual tokens kept: the choices, controls, and any promise.

    None if budgets are prices: these have `front_figure`.
    """
    if any("prices" in point for point in evidence_of(policies[0])["retention"]):
        return None
    evidence, total = evidence_of(policies[0]), visual_tokens(policies[0])
    figure, axes = plain_figure(8, 4.2)
    points = {point["tokens"]: (point["agreement"], *point["interval"]) for point in evidence["retention"]}
    joined = len(points.keys() - {total}) > 1  # from one budget to the unpruned model a line would be a guess
    if joined:
        points[total] = (1.0, 1.0, 1.0)  # keep 1.0 is the unpruned model
    else:
        axes.plot(total, 1.0, color="black", linestyle="none", marker="*", markersize=9, label="no pruning")
    look: dict[str, Any] = {"color": CHOSEN, "linestyle": "-" if joined else "none", "linewidth": 2.5, "marker": "o"}
    draw_intervals(axes, sorted(points), points, **look, zorder=3, label="chosen")
    shades = matplotlib.colormaps["viridis"](np.linspace(0, DARKER, len(CONTROLS)))
    for (name, marker), shade in zip(CONTROLS.items(), shades, strict=True):
        measured = {keep_count(policy.keep, total): checked(policy, name)[:1] for policy in policies}
        found = sorted((tokens, *agreed) for tokens, agreed in measured.items() if agreed)
        if not joined or len(found) < len(points) - 1:  # with a promise a control is measured at one budget of many
            line = "none"
        else:
            line, found = "-", [*found, (total, 1.0)]
        if found:
            tokens, agreed = zip(*found, strict=True)
            style: dict[str, Any] = {"marker": marker, "markersize": 5, "linestyle": line, "linewidth": 1.2}
            axes.plot(tokens, agreed, color=shade, label=figure_text(name), **style)
    if "promise" in evidence:
        promised = 1 - evidence["promise"]["max_disagreement"]
        axes.axhline(promised, color="black", linestyle=":", label=f"promised: {promised:.1%}")
    shown = sorted({*points, total})
    if len([place for place in shown if place > 0]) == 1:  # a logarithmic axis with one place would have no width
        axes.set_xlim(total / 2, 2 * total)
    axes.set_xscale("log", base=2)
    axes.set_xticks(shown, [str(count) for count in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.05 if joined else 0.2)
    axes.set(xlabel=f"visual tokens kept of each image, {LOGARITHMIC}", ylabel=AGREEMENT)
    axes.set_ylim(top=1.02)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def layer_figure(policies: Sequence[PruningPolicy]) -> Figure | None:
    """Plot agreement when one layer is read alone: figure 5 of 2404.08567, for the user's own model and method."""
    alone = [(policy, found) for policy in policies if (found := _layers_alone(policy))]
    if not alone:
        return None
    figure, axes = plain_figure(7, 4.2)
    shades = matplotlib.colormaps["viridis"](np.linspace(0, DARKER, len(alone)))
    for number, ((policy, found), shade) in enumerate(zip(alone, shades, strict=True)):
        aside = 0.08 * (number - (len(alone) - 1) / 2)  # so that intervals do not hide each other
        shifted = {layer + aside: figures for layer, figures in found.items()}
        look: dict[str, Any] = {"color": shade, "marker": "o", "label": budget_name(policy), "gid": BESIDE}
        draw_intervals(axes, sorted(shifted), shifted, **look)
        chosen = checked(policy, evidence_of(policy)["chosen"])[0]
        label = "chosen policy" if number + 1 == len(alone) else None  # once in the legend
        axes.axhline(chosen, color=shade, linestyle="--", linewidth=1, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(WRITTEN, integer=True))
    axes.set(xlabel="layer that is read alone, 0 the first", ylabel=AGREEMENT, ylim=(0, 1.02))
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    return figure


def head_figure(policies: Sequence[PruningPolicy]) -> Figure | None:
    """Plot the fitted head weights of the chosen layers, a heatmap for each scorer that has any."""
    found = {name: fit for name, fit in fits(policies[0]).items() if np.any(fit.get("head_weights", 0))}
    if not found:
        return None
    shapes = {name: np.shape(fit["head_weights"]) for name, fit in found.items()}
    heads = max(columns for _, columns in shapes.values())
    heights = [0.45 * rows + 1 for rows, _ in shapes.values()]
    figure = Figure(figsize=(min(12, max(6, 0.6 * heads + 2)), sum(heights) + 0.3), layout="constrained")
    grid = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, fit) in zip(grid, found.items(), strict=True):
        weights = np.array(fit["head_weights"])
        heatmap(figure, axes, weights, float(np.abs(weights).max()), "weight", ".2g")
        axes.set_yticks(range(len(weights)), [str(layer) for layer in fit["layers"]])
        axes.set(title=figure_text(name), xlabel="head", ylabel="layer")
    return figure


def slot_figure(policies: Sequence[PruningPolicy]) -> Figure | None:
    """Plot the value of each slot (a place among an image's visual tokens) for the answer, whatever the image shows."""
    worth = np.array(evidence_of(policies[0])["fitted"]["slots"])
    if not len(worth):
        return None
    figure, axes = plain_figure(8, 3.2)
    low, high = (matplotlib.colormaps["RdBu_r"](place) for place in (0.12, 0.88))
    axes.bar(range(len(worth)), worth, color=[high if value > 0 else low for value in worth], width=0.85, zorder=2)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(WRITTEN, integer=True))
    axes.set(xlabel="slot: place among an image's visual tokens", ylabel="log-probability gained [nats]")
    axes.margins(x=0.01)
    return figure


def _layers_alone(policy: PruningPolicy) -> dict[float, tuple[float, ...]]:
    """Return (agreement, low, high) by layer that is read alone: CATP's layers, else those of another method."""
    rows = [(re.fullmatch(r"([\w-]+) layer (\d+)", row["name"]), row) for row in evidence_of(policy)["candidates"]]
    methods = sorted({match[1] for match, _ in rows if match}, key=lambda name: (name != "catp", name))
    figures = {int(match[2]): row["check"] or row["choose"] for match, row in rows if match and match[1] == methods[0]}
    return {layer: (found["agreement"], *found["interval"]) for layer, found in figures.items()}


def plain_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of this size in inches, with axes that have a faint grid and no frame."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return figure, axes


def draw_intervals(axes: Axes, places: Sequence[float], points: Mapping[Any, Sequence[float]], **style: Any) -> None:
    """Draw a line through points (value, low, high) at `places`, with their intervals as error bars."""
    values, low, high = (np.array([points[place][column] for place in places]) for column in range(3))
    errors = np.maximum(0, [values - low, high - values])  # rounding may put an end of an interval a hair inside
    axes.errorbar(places, values, yerr=errors, capsize=3, elinewidth=1.2, **style)
