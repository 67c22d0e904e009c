"""Figures as bytes of PNG files, and words on their axes."""

import warnings
from io import BytesIO

from matplotlib.figure import Figure
from matplotlib.text import Text

LOGARITHMIC = "on a logarithmic scale"


def png(figure: Figure, dpi: int = 110) -> bytes:
    """Render a figure as PNG; TeX is not used, and "$" starts a formula in tick labels only."""
    along = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    numbers = {text for axis in along for text in axis.findobj(Text)} - {axis.label for axis in along}
    for text in figure.findobj(Text):
        text.set_usetex(False)
        text.set_parse_math(text in numbers)  # tick labels may be powers
    buffer = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a box replaces it in a name
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
