"""Panels of query tokens, which stand for no patch: how much each attends to the patches of its image."""

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
from matplotlib.figure import Figure, SubFigure

from catp_lightning.plots.panels import colours, range_of
from catp_lightning.pruning.shown import Shown

ACROSS = 9
"""Number of panels in a row."""

MOST = 32
"""Number of query tokens that are drawn."""

SIDE = 1.1
"""Height and width of a panel in inches."""

HEAT: dict[str, Any] = {"cmap": "inferno", "alpha": 0.65}
"""Look of attention over a picture."""

GAP, TITLE = 0.08, 0.42
"""Space between panels and above each, in heights of a panel."""


def size_of_queries(count: int) -> tuple[float, float]:
    """Return width and height in inches of the panels of `count` query tokens and of the image before them."""
    panels = 1 + min(count, MOST)
    return SIDE * (1 + GAP) * max(3, min(ACROSS, panels)), SIDE * (1 + TITLE) * ceil(panels / ACROSS)


def draw_queries(
    figure: Figure | SubFigure, shown: Shown, keep: np.ndarray, titles: Sequence[str] | None = None
) -> None:
    """Draw the image of a sample, and a panel for each query token in `keep`, those with the highest scores first.

    All panels share one axes, which is many times quicker to lay out than an axes for each.

    Args:
        figure: the figure, or a part of one.
        shown: the sample.
        keep: bool [N], tokens that are drawn.
        titles: titles of panels by token; None: the numbers of the tokens.
    """
    tokens = np.flatnonzero(keep)
    if shown.last.scores is not None:
        tokens = tokens[np.argsort(-shown.last.scores.numpy()[tokens], kind="stable")]
    assert shown.attention is not None
    attention, axes = shown.attention.numpy(), figure.add_subplot()
    axes.set_axis_off()
    drawn = [-1, *tokens[:MOST].tolist()]
    for number, token in enumerate(drawn):
        row, column = divmod(number, ACROSS)
        left, top = column * (1 + GAP), row * (1 + TITLE)
        extent = (left, left + 1, top + 1, top)
        (part,) = shown.images[int(shown.image[max(token, 0)])]
        axes.imshow(colours(part, range_of([part]), grey=token >= 0), extent=extent)
        title = "image"
        if token >= 0:
            brightest = float(np.nanmax(attention[token])) or 1.0
            axes.imshow(attention[token], extent=extent, vmin=0, vmax=brightest, interpolation="nearest", **HEAT)
            title = f"query {token}" if titles is None else titles[token]
        axes.text(left + 0.5, top - 0.04, title, ha="center", va="bottom", fontsize=8)
    rows, columns = ceil(len(drawn) / ACROSS), min(ACROSS, len(drawn))
    axes.set(xlim=(0, columns * (1 + GAP) - GAP), ylim=(rows * (1 + TITLE) - TITLE, -TITLE))
