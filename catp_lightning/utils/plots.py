"""Figures as bytes of PNG files, and words on their axes."""

from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from catp_lightning.utils.messages import without_warnings

LOGARITHMIC = "on a logarithmic scale"

BESIDE = "beside"
"""Identifier (gid) of lines whose points are drawn beside the tick they belong to, so as not to hide each other."""


def png(figure: Figure, dpi: int = 110) -> bytes:
    """Render a figure as PNG on an opaque ground, its own or white, so that it can be read on light and dark pages.

    TeX is not used, and "$" starts a formula in tick labels only.
    """
    along = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    numbers = {text for axis in along for text in axis.findobj(Text)} - {axis.label for axis in along}
    for text in figure.findobj(Text):
        text.set_usetex(False)
        text.set_parse_math(text in numbers)  # tick labels may be powers
    buffer = BytesIO()
    with without_warnings("Glyph .* missing from"):  # a box replaces it in a name
        ground = figure.get_facecolor() if to_rgba(figure.get_facecolor())[3] == 1 else "white"
        figure.savefig(buffer, format="png", dpi=dpi, transparent=False, facecolor=ground)
    return buffer.getvalue()


WRITTEN = 16  # columns up to which a heatmap shows its numbers


def heatmap(figure: Figure, axes: Axes, values: np.ndarray, limit: float, label: str, written: str) -> None:
    """Draw a heatmap of signed values: white is 0, red above, blue below; exact zeros get no number."""
    image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    figure.colorbar(image, ax=axes, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(WRITTEN, integer=True))
    if values.shape[1] <= WRITTEN:
        for (row, column), value in np.ndenumerate(values):
            if value:
                shade = "white" if abs(value) > 0.6 * limit else "black"
                axes.text(column, row, f"{value:{written}}", ha="center", va="center", color=shade, fontsize=8)
