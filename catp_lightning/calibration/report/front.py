"""Draw the Pareto front of a calibration at prices: what each price buys, beside what it was compared with."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from catp_lightning.calibration.report.evidence import amount, checked, evidence_of, unit
from catp_lightning.calibration.report.figures import CHOSEN, CONTROLS, DARKER, draw_intervals, plain_figure
from catp_lightning.policy import PruningPolicy
from catp_lightning.safe_text import figure_text
from catp_lightning.utils.plots import LOGARITHMIC

INSIDE = "best single stage inside the decoder"
"""Label of the best rule that drops tokens at one layer and nowhere else, another at each price."""


def front_figure(policies: Sequence[PruningPolicy]) -> Figure | None:
    """Plot disagreement with the unpruned model over the price; None if budgets are no prices."""
    priced = [policy for policy in policies if "prices" in policy.evidence]
    if not priced:
        return None
    figure, axes = plain_figure(8, 4.2)
    lines = {name: [checked(policy, name) for policy in priced] for name in CONTROLS}
    lines = {name: found for name, found in lines.items() if any(found)}
    shades = matplotlib.colormaps["viridis"](np.linspace(0, DARKER, len(lines)))
    for (name, found), shade in zip(lines.items(), shades, strict=False):
        _draw(axes, priced, found, color=shade, marker=CONTROLS[name], label=figure_text(name))
    if any(alone := [_alone(policy) for policy in priced]):
        _draw(axes, priced, alone, color="black", marker="x", linestyle="--", label=INSIDE)
    chosen = [checked(policy, evidence_of(policy)["chosen"]) for policy in priced]
    _draw(axes, priced, chosen, color=CHOSEN, marker="o", linewidth=2.5, zorder=3, label="chosen")
    shown = sorted({amount(policy) for policy in priced})
    axes.set_xscale("log", base=2)
    if len(shown) == 1:  # a logarithmic axis with one place would have no width
        axes.set_xlim(shown[0] / 2, 2 * shown[0])
    axes.set_xticks(shown, [f"{share:g}" for share in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    label = f"{unit(priced[0])}, as a share of the unpruned model's, {LOGARITHMIC}"
    axes.set(xlabel=label, ylabel="share of answers unlike the unpruned model's")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def _alone(policy: PruningPolicy) -> tuple[float, ...]:
    """Return (agreement, low, high) of the rule of one stage inside the decoder that was checked; () if none was."""
    rows = evidence_of(policy)["candidates"]
    return next((checked(policy, row["name"]) for row in rows if row.get("inside") and row["check"]), ())


def _draw(axes: Any, policies: Sequence[PruningPolicy], found: Sequence[Sequence[float]], **style: Any) -> None:
    """Draw disagreements over prices, with intervals, from agreements (value, low, high)."""
    points: Mapping[int | float, Sequence[float]] = {
        amount(policy): (1 - agreed[0], 1 - agreed[2], 1 - agreed[1])
        for policy, agreed in zip(policies, found, strict=True)
        if agreed
    }
    draw_intervals(axes, sorted(points), points, **{"markersize": 5, "linewidth": 1.2, **style})
