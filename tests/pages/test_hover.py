"""What a page draws of a figure is what matplotlib drew, point for point."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from catp_lightning.calibration.report.figures import draw_intervals, plain_figure
from catp_lightning.pages.hover import panels
from catp_lightning.utils.plots import BESIDE, heatmap


def test_points_have_their_intervals_places_on_a_linear_axis_and_their_numbers_in_words() -> None:
    figure, axes = plain_figure(4, 3)
    points = {4.0: (0.5, 0.25, 0.75), 16.0: (0.875, 0.8, 1.0)}
    draw_intervals(axes, [4.0, 16.0], points, color="crimson", marker="s", linestyle="--", label="ours")
    axes.axhline(0.9, color="black", linestyle=":", label="promised")
    axes.plot([4.0, 8.0], [0.1, 0.2], color="blue", label="_hidden")
    axes.set_xscale("log", base=2)
    axes.set_xticks([16.0, 4.0], ["sixteen", "four"])
    axes.set(xlabel="tokens kept, on a scale", ylabel="share", ylim=(0, 1))
    (panel,) = panels(figure)
    assert panel["x"]["ticks"] == [(2.0, "four"), (4.0, "sixteen")], "in order, at their logarithms"
    assert panel["y"]["range"] == [0, 1] and panel["y"]["label"] == "share"
    ours, line, hidden = panel["series"]
    assert np.allclose(ours["points"], [[2, 0.5, 0.25, 0.75], [4, 0.875, 0.8, 1.0]])
    assert ours["texts"] == ["tokens kept 4: 0.5 (0.25 to 0.75)", "tokens kept 16: 0.875 (0.8 to 1)"]
    look = [ours[name] for name in ("name", "color", "dash", "marker")]
    assert look == ["ours", "#dc143c", "dashed", "square"]
    assert (line["name"], line["at"], line["text"], line["dash"]) == ("promised", 0.9, "0.9", "dotted")
    assert hidden["name"] == "" and hidden["texts"] == ["tokens kept 4: 0.1", "tokens kept 8: 0.2"]


def test_points_beside_a_tick_are_told_by_it() -> None:
    figure, axes = plain_figure(4, 3)
    axes.errorbar([0.9, 2.1], [0.5, 0.25], [[0.1, 0.1], [0.2, 0.2]], label="a", gid=BESIDE)
    axes.set_xticks([1, 2], ["one", "two"])
    axes.set(xlabel="layer")
    ((series,),) = (panel["series"] for panel in panels(figure))
    assert series["texts"] == ["layer one: 0.5 (0.4 to 0.7)", "layer two: 0.25 (0.15 to 0.45)"]
    assert [point[0] for point in series["points"]] == pytest.approx([0.9, 2.1]), "drawn where they were"


def test_a_heatmap_is_its_cells_and_its_colour_bar_no_panel() -> None:
    figure = Figure()
    axes = figure.subplots()
    heatmap(figure, axes, np.array([[0.5, -0.25, 0.0], [1.0, 0.0, 0.125]]), 1.0, "weight", ".2g")
    axes.set_yticks([0, 1], ["3", "7"])
    axes.set(xlabel="head", ylabel="layer", title="of one")
    (panel,) = panels(figure)
    ((found,)) = panel["series"]
    assert panel["title"] == "of one" and len(found["cells"]) == 6
    assert found["texts"][1] == "layer 3, head 1: weight -0.25" and found["texts"][3] == "layer 7, head 0: weight 1"
    assert found["cells"][3][:4] == [0, 1, 1, 1] and found["cells"][2][4] == "#f7f6f6"
    assert panel["y"]["range"] == [1.5, -0.5], "the first row is at the top"


def test_bars_are_cells_and_a_figure_without_anything_has_no_panel() -> None:
    figure, axes = plain_figure(4, 3)
    axes.bar([0, 1], [0.5, -0.25], width=0.8)
    axes.set(xlabel="slot: place")
    ((series,),) = (panel["series"] for panel in panels(figure))
    assert [cell[:4] for cell in series["cells"]] == [
        [0, 0.25, pytest.approx(0.8), 0.5],
        [1, -0.125, pytest.approx(0.8), 0.25],
    ]
    assert series["texts"] == ["slot 0: 0.5", "slot 1: -0.25"]
    empty, axes = plain_figure(4, 3)
    axes.text(0.5, 0.5, "nothing here")
    assert panels(empty) == []
