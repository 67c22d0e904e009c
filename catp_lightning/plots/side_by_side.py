"""One sample several times: at several budgets with its answers, and layer by layer."""

from collections.abc import Sequence
from math import ceil

import numpy as np
import torch
from matplotlib.figure import Figure, SubFigure

from catp_lightning.plots.kept import draw_kept, require_drawable
from catp_lightning.plots.panels import Panel, blocks_of, draw_picture, range_of, size_of
from catp_lightning.plots.picture import Picture
from catp_lightning.plots.queries import HEAT
from catp_lightning.pruning.shown import Shown
from catp_lightning.safe_text import figure_text

WIDEST = 12.0
"""Width of a picture in inches that is filled before the next row begins."""

Panels = Sequence[tuple[Shown, np.ndarray, str]]
"""What is drawn side by side: a sample, the tokens that are there, bool [N], and a title."""


def by_budget(samples: Sequence[tuple[Shown, str]]) -> Picture:
    """Draw one sample at several budgets, each with the model's answer: figure 4 of 2404.08567, for any model.

    Each is drawn as by `kept_tokens`; of query tokens (BLIP-2) one panel shows how much the kept ones attend to each
    patch on average, from 0 to the largest.

    Args:
        samples: what was kept of the same sample at each budget, and the answer that was given then; without an answer
            if it is empty.

    Raises:
        PruningError: the sample has no image.
        ValueError: `samples` is empty.

    Example::

        found = []
        for keep in (1.0, 0.5, 0.25):
            with prune(model, policy.with_keep(keep), show=True) as pruning:
                ids = model.generate(**batch)
            found.append((pruning.shown[0], processor.decode(ids[0], skip_special_tokens=True)))
        plots.by_budget(found)
    """
    if not samples:
        raise ValueError("samples is empty; give a pair of what was kept and an answer for each budget.")
    return _drawn([(shown, shown.last.keep.numpy(), _told(shown, answer)) for shown, answer in samples])


def by_layer(shown: Shown) -> Picture:
    """Draw the tokens of a sample that are still there from layer to layer, where they leave at one layer or several.

    Each stage is drawn as by `by_budget`, after all tokens.

    Args:
        shown: what a prefill kept of one sample, from `pruning.shown` of `prune(model, policy, show=True)`.

    Raises:
        PruningError: the sample has no image.
    """
    everything = np.ones(len(shown.image), bool)
    panels = [(shown, everything, f"before: {len(everything):,} tokens")]
    for stage in shown.stages:
        keep = stage.keep.numpy()
        place = f"layer {stage.layer}" if stage.layer else "the first layer"
        panels.append((shown, keep, f"from {place} on: {int(keep.sum()):,}"))
    return _drawn(panels)


def _told(shown: Shown, answer: str) -> str:
    count = f"{int(shown.last.keep.sum()):,} of {len(shown.last.keep):,} tokens"
    return f"{count}\nanswer: {figure_text(answer)}" if answer else count


def _drawn(panels: Panels) -> Picture:
    for shown, _, _ in panels:
        require_drawable(shown)
    sizes = [(2.2, 2.2) if shown.attention is not None else size_of(blocks_of(shown), 2.2) for shown, _, _ in panels]
    wide, high = max(1.8, *(size[0] for size in sizes)), max(size[1] for size in sizes)
    across = max(1, min(len(panels), int(WIDEST / wide)))
    rows = ceil(len(panels) / across)
    above = 0.2 + 0.175 * max(title.count("\n") + 1 for _, _, title in panels)
    figure = Figure(figsize=(across * wide, rows * (high + above)), layout="constrained")
    places = figure.subfigures(rows, across, squeeze=False).flat
    for place, (shown, keep, title) in zip(places, panels, strict=False):
        if shown.attention is None:
            draw_kept(place, shown, keep)
        else:
            _draw_attended(place, shown, keep)
        place.suptitle(title, fontsize=10)
    return Picture(figure)


def _draw_attended(figure: Figure | SubFigure, shown: Shown, keep: np.ndarray) -> None:
    """Draw how much the query tokens in `keep` attend to each patch of the sample's images, side by side."""
    assert shown.attention is not None
    row = figure.subplots(1, len(shown.images), squeeze=False)[0]
    for number, (axes, (part,)) in enumerate(zip(row, shown.images, strict=True)):
        draw_picture(axes, part, range_of([part]), grey=True)
        own = shown.attention[torch.from_numpy(keep) & (shown.image == number)]
        if len(own):
            panel = Panel(axes, part, np.zeros(0, int), np.zeros((0, 2), int))
            panel.overlay(own.mean(0).numpy(), vmin=0, vmax=float(own.mean(0).max()) or 1.0, **HEAT)
