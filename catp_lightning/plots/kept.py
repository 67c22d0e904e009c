"""Kept tokens over the image."""

import numpy as np
from matplotlib.figure import Figure, SubFigure

from catp_lightning.errors import PruningError
from catp_lightning.plots.panels import MOST, blocks_of, panels_of, size_of
from catp_lightning.plots.picture import Picture
from catp_lightning.plots.queries import draw_queries, size_of_queries
from catp_lightning.pruning.shown import Shown

VEIL = (0.5, 0.5, 0.5, 0.72)
"""Grey over patches whose token was dropped: red, green, blue and opacity."""


def kept_tokens(shown: Shown) -> Picture:
    """Draw the kept tokens of a sample over its images: dropped patches are grey, and a line surrounds the kept ones.

    Images are drawn as the model reads them: resized, cropped, cut into crops or tiles, pixels stretched to the range
    from dark to light; plain grey where it is not known how their pixels lie. Of a sample with many images or frames
    the first 16 are drawn. Query tokens (BLIP-2) stand for no patch: each one that is kept has a panel that shows how
    much it attends to the patches, the mean over layers and heads, from 0 to its own largest attention; of more than 32
    those with the highest scores are drawn.

    Args:
        shown: what a prefill kept of one sample, from `pruning.shown` of `prune(model, policy, show=True)`. Where
            tokens leave at several layers, what the last of them keeps is drawn.

    Raises:
        PruningError: the sample has no image.
    """
    require_drawable(shown)
    keep = shown.last.keep.numpy()
    figure = Figure(layout="constrained")
    if shown.attention is not None:
        wide, high = size_of_queries(int(keep.sum()))
        figure.set_size_inches(wide, high + 0.5)
        draw_queries(figure, shown, keep)
    else:
        wide, high = size_of(blocks_of(shown), 3.2)
        figure.set_size_inches(max(wide, 3.4), high + 0.5)
        draw_kept(figure, shown, keep)
    figure.suptitle(kept_title(shown, keep), fontsize=11)
    return Picture(figure)


def draw_kept(figure: Figure | SubFigure, shown: Shown, keep: np.ndarray) -> None:
    """Draw a sample's images, grey where `keep`, bool [N], is False."""
    for panel in panels_of(figure, shown, blocks_of(shown), grey=False):
        inside = panel.spread(keep, False)
        veil = np.zeros((*inside.shape, 4))
        veil[~inside] = VEIL
        panel.overlay(veil)
        panel.outline(inside)


def kept_title(shown: Shown, keep: np.ndarray) -> str:
    """Return how many tokens of a sample are kept, as a title; `keep` is bool [N]."""
    title = f"{int(keep.sum()):,} of {len(keep):,} visual tokens kept"
    if shown.attention is not None:
        return f"{title}\nbright: patches that a query token attends to, dark: those that it does not"
    if len(shown.images) > MOST:
        title += f"\n(the first {MOST} of {len(shown.images):,} images are drawn)"
    beside = shown.places[:, 1].numpy() < 0
    if beside.any():
        title += f"\n({int(keep[beside].sum()):,} of {int(beside.sum()):,} that stand for no patch)"
    return title


def require_drawable(shown: Shown) -> None:
    """Raise PruningError if a sample has no token that lies in an image."""
    if not shown.drawable:
        raise PruningError("This sample has no image, so there is nothing to draw: choose another one.")
