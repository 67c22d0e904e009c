"""Scores of tokens as a heat map over the image."""

import numpy as np
from matplotlib.figure import Figure

from catp_lightning.errors import PruningError
from catp_lightning.plots.kept import require_drawable
from catp_lightning.plots.panels import blocks_of, panels_of, size_of
from catp_lightning.plots.picture import Picture
from catp_lightning.plots.queries import draw_queries, size_of_queries
from catp_lightning.pruning.shown import Shown

TOP = 99.0
"""Percentile of the scores from which on all have the brightest colour: single scores are often far above the rest."""


def score_map(shown: Shown) -> Picture:
    """Draw the scores of a sample's tokens as a heat map over its images, with a line around the tokens that are kept.

    Colours go from the lowest score to the 99th percentile. A patch without a score, of a token that was dropped at an
    earlier layer for example, has no colour. Of query tokens (BLIP-2) the panels of `kept_tokens` are drawn for all of
    them, those with the highest scores first, each with its score and a mark where it is kept.

    Args:
        shown: what a prefill kept of one sample, from `pruning.shown` of `prune(model, policy, show=True)`. Where
            tokens leave at several layers, the scores are those at the last of them.

    Raises:
        PruningError: the sample has no image; or its tokens were not scored: the policy keeps all of them, or `choose`
            chose them.
    """
    require_drawable(shown)
    if shown.last.scores is None:
        raise PruningError(
            "The tokens of this sample have no scores: the policy keeps all of them, or choose= chose them. Draw what "
            "is kept, kept_tokens, or give prune a policy that scores."
        )
    scores, keep = shown.last.scores.numpy(), shown.last.keep.numpy()
    scores = np.where(np.isfinite(scores), scores, np.nan)
    figure = Figure(layout="constrained")
    if shown.attention is not None:
        wide, high = size_of_queries(len(keep))
        figure.set_size_inches(wide, high + 0.5)
        titles = [f"query {token}{', kept' * bool(stays)}\n{scores[token]:.4g}" for token, stays in enumerate(keep)]
        draw_queries(figure, shown, np.ones_like(keep), titles)
        figure.suptitle("query tokens, their scores and the patches that they attend to (bright)", fontsize=11)
        return Picture(figure)
    blocks = blocks_of(shown)
    wide, high = size_of(blocks, 3.2)
    figure.set_size_inches(max(wide, 3.4) + 0.9, high + 0.5)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(max(wide, 3.4), 0.9))[0]
    on_patch = scores[shown.places[:, 1].numpy() >= 0]
    low, top = _range(on_patch)
    for panel in panels_of(left, shown, blocks, grey=True):
        drawn = panel.overlay(panel.spread(scores, np.nan), cmap="viridis", vmin=low, vmax=top, alpha=0.65)
        panel.outline(panel.spread(keep, False))
    clipped = np.nanmax(on_patch, initial=top) > top
    bar = right.add_axes((0.08, 0.06, 0.2, 0.88))
    figure.colorbar(drawn, cax=bar, format="%.3g", extend="max" if clipped else "neither")
    figure.suptitle(f"scores of {len(keep):,} visual tokens; {int(keep.sum()):,} kept", fontsize=11)
    return Picture(figure)


def _range(scores: np.ndarray) -> tuple[float, float]:
    known = scores[np.isfinite(scores)]
    if not len(known):
        return 0.0, 1.0
    low, top = float(known.min()), float(np.percentile(known, TOP))
    return low, top if top > low else low + 1.0
