"""Panels that pictures are made of: the parts of a sample's images side by side, and what is drawn over them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure, SubFigure

from catp_lightning.models.images import Part
from catp_lightning.pruning.shown import Shown

MOST = 16
"""Number of images or frames of a sample that are drawn."""

ACROSS = 4
"""Number of images or frames in a row of a picture."""

EDGE = "crimson"
"""Colour of the line around kept tokens, seen on black, white and grey alike."""

PLAIN = 0.6
"""Grey, from 0 to 1, of a part whose pixels are not known."""


@dataclass(frozen=True)
class Panel:
    """Axes of one part of an image; one unit of its coordinates is a patch, and row 0 is at the top.

    Attributes:
        axes: the axes.
        part: the part.
        tokens: int64 [n], numbers of the sample's tokens whose patches lie in it.
        cells: int64 [n, 2], row and column of each of them.
    """

    axes: Axes
    part: Part
    tokens: np.ndarray
    cells: np.ndarray

    def spread(self, values: np.ndarray, empty: Any) -> np.ndarray:
        """Lay values of the sample's tokens, [N], out over the part: [rows, columns], `empty` where no token lies."""
        found = np.full((self.part.rows, self.part.columns), empty)
        found[self.cells[:, 0], self.cells[:, 1]] = values[self.tokens]
        return found

    def overlay(self, values: np.ndarray, **style: Any) -> Any:
        """Draw values, [rows, columns], or colours, [rows, columns, 4], over the part; return matplotlib's image."""
        extent = (0, self.part.columns, self.part.rows, 0)
        return self.axes.imshow(values, extent=extent, aspect=self.axes.get_aspect(), interpolation="nearest", **style)

    def outline(self, inside: np.ndarray) -> None:
        """Draw a line around the patches where `inside`, bool [rows, columns], is True."""
        padded = np.pad(inside, 1)
        lines: list[list[tuple[int, int]]] = []
        for row, column in np.argwhere(padded[:, 1:] != padded[:, :-1]).tolist():
            lines.append([(column, row - 1), (column, row)])
        for row, column in np.argwhere(padded[1:] != padded[:-1]).tolist():
            lines.append([(column - 1, row), (column, row)])
        self.axes.add_collection(LineCollection(lines, colors=EDGE, linewidths=1.5, capstyle="projecting"))


@dataclass(frozen=True)
class Block:
    """Parts of one image that are drawn, side by side.

    Attributes:
        image: number of the image among the sample's.
        parts: the parts that have a token, with their numbers.
    """

    image: int
    parts: Sequence[tuple[int, Part]]

    @property
    def cells(self) -> list[tuple[int, int]]:
        """Row and column in which each part is drawn: its own, or, of parts in one row, the next one."""
        if any(part.at[0] for _, part in self.parts):
            return [part.at for _, part in self.parts]
        return [(0, number) for number in range(len(self.parts))]

    @property
    def shares(self) -> list[float]:
        """Widths of its columns, in heights of a row."""
        aspects: dict[int, float] = {}
        for (_, column), (_, part) in zip(self.cells, self.parts, strict=True):
            high, wide = (part.rows, part.columns) if part.picture is None else part.picture.shape[1:]
            aspects[column] = max(wide / high, aspects.get(column, 0))
        return [aspects.get(column, 1.0) for column in range(1 + max(aspects))]

    @property
    def rows(self) -> int:
        return 1 + max(row for row, _ in self.cells)


def blocks_of(shown: Shown) -> list[Block]:
    """Return what is drawn of each image of a sample: parts in which a token's patch lies, at most `MOST` images."""
    on_patch = shown.places[:, 1] >= 0
    met = set(zip(shown.image[on_patch].tolist(), shown.places[on_patch, 0].tolist(), strict=True))
    numbered = [
        Block(image, [(place, part) for place, part in enumerate(parts) if (image, place) in met])
        for image, parts in enumerate(shown.images)
    ]
    return [block for block in numbered if block.parts][:MOST]


def size_of(blocks: Sequence[Block], height: float) -> tuple[float, float]:
    """Return width and height in inches of the blocks of a sample: one is `height` inches high, several are smaller."""
    across = min(ACROSS, len(blocks))
    height *= 1.0 if len(blocks) == 1 else 0.6
    widest = max(sum(block.shares) / block.rows for block in blocks)
    return across * min(9.0, height * widest), ceil(len(blocks) / across) * height


def panels_of(figure: Figure | SubFigure, shown: Shown, blocks: Sequence[Block], grey: bool) -> list[Panel]:
    """Draw images of a sample and return a panel for each of their parts.

    Args:
        figure: the figure, or a part of one.
        shown: the sample.
        blocks: those of its images that are drawn, one at least.
        grey: True to draw pictures without colours, so that colours can be drawn over them.
    """
    across, image, places = min(ACROSS, len(blocks)), shown.image.numpy(), shown.places.numpy()
    outer = figure.add_gridspec(ceil(len(blocks) / across), across)
    found = []
    for number, block in enumerate(blocks):
        scale = range_of([part for _, part in block.parts])
        shares = block.shares
        inner = outer[divmod(number, across)].subgridspec(
            block.rows, len(shares), width_ratios=shares, wspace=0.03, hspace=0.03
        )
        for cell, (place, part) in zip(block.cells, block.parts, strict=True):
            axes = figure.add_subplot(inner[cell])
            draw_picture(axes, part, scale, grey)
            own = np.flatnonzero((image == block.image) & (places[:, 0] == place) & (places[:, 1] >= 0))
            found.append(Panel(axes, part, own, places[own, 1:]))
    return found


def draw_picture(axes: Axes, part: Part, scale: tuple[float, float], grey: bool) -> None:
    """Draw the pixels of a part so that one unit of the coordinates is a patch; arguments as those of `colours`."""
    axes.set_axis_off()
    high, wide = (part.rows, part.columns) if part.picture is None else part.picture.shape[1:]
    shape = high / part.rows * part.columns / wide
    axes.imshow(colours(part, scale, grey), extent=(0, part.columns, part.rows, 0), aspect=shape)


def colours(part: Part, scale: tuple[float, float], grey: bool) -> np.ndarray:
    """Return the colours of a part's pixels, from 0 to 1: float [H, W, 3]; one grey pixel where they are not known.

    Args:
        part: the part.
        scale: value of the darkest and of the lightest pixel, as from `range_of`.
        grey: True for greys that are neither dark nor light.
    """
    if part.picture is None:
        return np.full((1, 1, 3), PLAIN)
    low, top = scale
    image = (part.picture.numpy().transpose(1, 2, 0) - low) / ((top - low) or 1.0)
    image = np.nan_to_num(image).clip(0, 1)
    image = 0.25 + 0.6 * image.mean(2, keepdims=True) if grey else image  # black or white would change what is over it
    return np.broadcast_to(image, (*image.shape[:2], 3))


def range_of(parts: Sequence[Part]) -> tuple[float, float]:
    """Return the smallest and the largest finite value of the pixels of some parts; 0 and 1 if there are none."""
    values = [part.picture[part.picture.isfinite()] for part in parts if part.picture is not None]
    values = [own for own in values if len(own)]
    return (min(float(own.min()) for own in values), max(float(own.max()) for own in values)) if values else (0.0, 1.0)
