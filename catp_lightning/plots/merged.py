"""Which tokens are merged into which kept one."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from catp_lightning.errors import PruningError
from catp_lightning.plots.kept import VEIL, require_drawable
from catp_lightning.plots.panels import Panel, blocks_of, panels_of, size_of
from catp_lightning.plots.picture import Picture
from catp_lightning.plots.queries import draw_queries, size_of_queries
from catp_lightning.pruning.shown import Shown

TINT = 0.6
"""Opacity of the colours of merged tokens."""


def merged_tokens(shown: Shown) -> Picture:
    """Draw which tokens of a sample are merged into which kept one: a colour, and lines to the kept one, for each.

    A line surrounds the tokens that are kept. Those that nothing is merged into have no colour, and dropped tokens are
    grey. Colours repeat after 20. Of query tokens (BLIP-2) the panels of `kept_tokens` are drawn for all of them, each
    with the number of the query token that it is merged into.

    Args:
        shown: what a prefill kept of one sample, from `pruning.shown` of `prune(model, policy, show=True)`. Where
            tokens leave at several layers, merging at the last of them is drawn.

    Raises:
        PruningError: the sample has no image, or the policy merges nothing.
    """
    require_drawable(shown)
    if shown.last.destination is None:
        raise PruningError(
            "Nothing was merged: the selector of this policy drops tokens. Those of visionzip, sparsevlm and others in "
            "docs/methods.md merge; kept_tokens draws what is kept under any."
        )
    into, keep = shown.last.destination.numpy(), shown.last.keep.numpy()
    moved = (into >= 0) & (into != np.arange(len(into)))
    figure = Figure(layout="constrained")
    if shown.attention is not None:
        wide, high = size_of_queries(len(keep))
        figure.set_size_inches(wide, high + 0.5)
        draw_queries(figure, shown, np.ones_like(keep), _titles(into, keep))
    else:
        blocks = blocks_of(shown)
        wide, high = size_of(blocks, 3.2)
        figure.set_size_inches(max(wide, 3.4), high + 0.5)
        groups = {int(kept): number for number, kept in enumerate(np.unique(into[moved]))}
        for panel in panels_of(figure, shown, blocks, grey=True):
            _draw_groups(panel, into, keep, groups)
    count, targets = int(moved.sum()), len(np.unique(into[moved]))
    figure.suptitle(f"{count:,} tokens merged\ninto {targets:,} of the {int(keep.sum()):,} that are kept", fontsize=11)
    return Picture(figure)


def _draw_groups(panel: Panel, into: np.ndarray, keep: np.ndarray, groups: dict[int, int]) -> None:
    """Draw the merged tokens of a panel in the colours of their groups, which are numbered by their kept tokens."""
    pairs = matplotlib.colormaps["tab20"](np.arange(20))[:, :3]
    colours = [*pairs[::2], *pairs[1::2]]  # each hue once, then the lighter ones
    cover = np.zeros((panel.part.rows, panel.part.columns, 4))
    cover[~panel.spread(np.ones_like(keep), False)] = VEIL
    centres = dict(zip(panel.tokens.tolist(), (panel.cells + 0.5).tolist(), strict=True))
    lines, shades = [], []
    for token, (row, column) in zip(panel.tokens.tolist(), panel.cells.tolist(), strict=True):
        target = int(into[token])
        if target not in groups:
            cover[row, column] = (0, 0, 0, 0) if keep[token] else VEIL
            continue
        shade = colours[groups[target] % len(colours)]
        cover[row, column] = (*shade, TINT)
        if token != target and target in centres:
            lines.append([centres[token][::-1], centres[target][::-1]])
            shades.append(shade)
    panel.overlay(cover)
    panel.axes.add_collection(LineCollection(lines, colors=shades, linewidths=0.8))
    panel.outline(panel.spread(keep, False))


def _titles(into: np.ndarray, keep: np.ndarray) -> Sequence[str]:
    return [
        f"query {token}\n{'kept' if keep[token] else 'dropped' if target < 0 else f'into {target}'}"
        for token, target in enumerate(into.tolist())
    ]
