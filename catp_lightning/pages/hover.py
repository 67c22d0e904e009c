"""What a matplotlib figure shows, as plain numbers and texts that a page draws again, with hover.

The page and the PNG file beside it are so made from one drawing, and cannot differ. Positions are those on a linear
axis: a logarithmic one is transformed here, and its ticks carry the numbers. Legends, shaded areas and numbers written
into a heatmap are left out; what is hovered over says the same.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from catp_lightning.utils.plots import BESIDE

MARKERS = {
    "o": "circle",
    "s": "square",
    "^": "triangle",
    ">": "triangle",
    "v": "inverted_triangle",
    "<": "inverted_triangle",
    "D": "diamond",
    "d": "diamond",
    "P": "plus",
    "x": "x",
    "X": "x",
    "*": "star",
    "p": "hex",
    "h": "hex",
}
"""Markers of matplotlib, and those of Bokeh that look like them; others become circles."""

DASHES = {"-": "solid", "--": "dashed", "-.": "dashdot", ":": "dotted"}

Panel = dict[str, Any]


def panels(figure: Figure) -> list[Panel]:
    """Return the panels of a figure that have something to hover over, as JSON types.

    Each has `title`, the axes `x` and `y` (`label`, `range` and `ticks`, pairs of a position and a text) and
    `series`. A series has `name` ("" if it is in no legend), `color` and one of: `points` ([x, y, low, high]) with
    `texts`, and `dash` and `marker` ("" for none); `at`, the height of a line across; or `cells`
    ([x, y, width, height, colour]) with `texts`.
    """
    bars = {image.colorbar.ax for axes in figure.axes for image in axes.images if image.colorbar is not None}
    found = [_panel(axes) for axes in figure.axes if axes not in bars]
    return [panel for panel in found if panel["series"]]


def _panel(axes: Axes) -> Panel:
    return {
        "title": axes.get_title(),
        "x": _axis(axes.xaxis),
        "y": _axis(axes.yaxis),
        "series": [*_heatmaps(axes), *_bars(axes), *_with_intervals(axes), *_lines(axes)],
    }


def _axis(axis: Axis) -> dict[str, Any]:
    low, high = axis.get_view_interval()
    places = sorted(place for place in axis.get_majorticklocs() if min(low, high) <= place <= max(low, high))
    texts = axis.get_major_formatter().format_ticks(places)
    ticks = list(zip(_on(axis, places), texts, strict=True))
    return {"label": axis.get_label_text(), "range": _on(axis, [low, high]), "ticks": ticks}


def _on(axis: Axis, values: Any) -> list[float]:
    """Return places on a linear axis."""
    return [float(value) for value in np.asarray(axis.get_transform().transform(np.asarray(values, float)))]


def _with_intervals(axes: Axes) -> Iterator[dict[str, Any]]:
    for container in axes.containers:
        if isinstance(container, ErrorbarContainer):
            line, _, bars = container.lines
            intervals = np.array([segment[:, 1] for segment in bars[0].get_segments()]) if bars else None
            yield _points(axes, line, str(container.get_label()), intervals)


def _lines(axes: Axes) -> Iterator[dict[str, Any]]:
    parts = [container.lines for container in axes.containers if isinstance(container, ErrorbarContainer)]
    known = {line for data, caps, _ in parts for line in (data, *caps)}
    for line in axes.lines:
        if line in known:
            continue
        if line.get_transform() == axes.get_yaxis_transform(which="grid"):
            (at,) = _on(axes.yaxis, np.ravel(line.get_ydata())[:1])
            yield {**_look(line, str(line.get_label())), "at": at, "text": _number(np.ravel(line.get_ydata())[0])}
        else:
            yield _points(axes, line, str(line.get_label()), _drawn_intervals(axes, line))


def _drawn_intervals(axes: Axes, line: Line2D) -> np.ndarray | None:
    """Return low and high ends, [N, 2], that vertical lines of a line's colour through its points show; or None."""
    for drawn in axes.collections:
        if isinstance(drawn, LineCollection) and _hex(drawn.get_color()[0]) == _hex(line.get_color()):
            segments = np.array(drawn.get_segments())
            if segments.shape == (len(np.ravel(line.get_xdata())), 2, 2) and np.array_equal(
                segments[:, 0, 0], line.get_xdata()
            ):
                return segments[:, :, 1]
    return None


def _points(axes: Axes, line: Line2D, label: str, intervals: np.ndarray | None) -> dict[str, Any]:
    x, y = np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)
    low, high = (y, y) if intervals is None else (intervals.min(1), intervals.max(1))
    texts = [
        f"{_at(axes, place, line.get_gid() == BESIDE)}: {_number(value)}"
        + (f" ({_number(least)} to {_number(most)})" if least < most else "")
        for place, value, least, most in zip(x, y, low, high, strict=True)
    ]
    columns = [_on(axes.xaxis, x), *(_on(axes.yaxis, values) for values in (y, low, high))]
    marker = str(line.get_marker())
    look = {**_look(line, label), "marker": "" if marker == "None" else MARKERS.get(marker, "circle")}
    return {**look, "points": [list(point) for point in zip(*columns, strict=True)], "texts": texts}


def _look(line: Line2D, label: str) -> dict[str, Any]:
    dash = DASHES.get(str(line.get_linestyle()), "")
    width = float(line.get_linewidth())
    return {"name": _name(label), "color": _hex(line.get_color()), "dash": dash, "width": width}


def _heatmaps(axes: Axes) -> Iterator[dict[str, Any]]:
    for image in axes.images:
        values = np.asarray(image.get_array())
        colours = image.to_rgba(values)
        named = "" if image.colorbar is None else f"{image.colorbar.ax.get_ylabel()} "
        rows, columns = (_ticks(*one) for one in zip((axes.yaxis, axes.xaxis), values.shape[:2], strict=True))
        yield {
            "name": "",
            "cells": [
                [float(column), float(row), 1.0, 1.0, _hex(colours[row, column])]
                for row, column in np.ndindex(values.shape)
            ],
            "texts": [
                f"{axes.get_ylabel()} {rows[row]}, {axes.get_xlabel()} {columns[column]}: "
                f"{named}{values[row, column]:.3g}"
                for row, column in np.ndindex(values.shape)
            ],
        }


def _bars(axes: Axes) -> Iterator[dict[str, Any]]:
    for container in axes.containers:
        if isinstance(container, BarContainer):
            boxes = [
                (patch.get_x() + patch.get_width() / 2, patch.get_height(), patch.get_width())
                for patch in container.patches
            ]
            yield {
                "name": "",
                "cells": [
                    [float(x), float(height) / 2, float(width), abs(float(height)), _hex(patch.get_facecolor())]
                    for (x, height, width), patch in zip(boxes, container.patches, strict=True)
                ],
                "texts": [f"{_at(axes, x)}: {height:.3g}" for x, height, _ in boxes],
            }


def _ticks(axis: Axis, count: int) -> list[str]:
    """Return the texts of the ticks at 0 to `count` - 1, or the place itself where there is none."""
    ticks = dict(_axis(axis)["ticks"])
    return [ticks.get(float(place), f"{place:g}") for place in range(count)]


def _at(axes: Axes, place: float, beside: bool = False) -> str:
    """Return where a point is, in the words of its axis up to the first comma or colon; `beside` its tick or on it."""
    name = axes.get_xlabel().replace("\n", " ").split(",")[0].split(":")[0]
    ticks = _axis(axes.xaxis)["ticks"] if beside else []
    (there,) = _on(axes.xaxis, [place])
    text = min(ticks, key=lambda tick: abs(tick[0] - there))[1] if ticks else _number(place)
    return f"{name} {text}".strip()


def _number(value: float) -> str:
    return f"{value:.4g}"


def _hex(color: Any) -> str:
    return str(to_hex(color))


def _name(label: str) -> str:
    """Return the name in a legend: matplotlib leaves out labels that begin with an underscore."""
    return "" if label.startswith("_") else label
