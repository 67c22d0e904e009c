"""The figures of a calibration's report: points and bars are what its policies record."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from catp_lightning import PruningPolicy
from catp_lightning.calibration.report.figures import (
    CONTROLS,
    head_figure,
    layer_figure,
    retention_figure,
    slot_figure,
)
from catp_lightning.calibration.statistics.rank_correlation import RankCorrelation
from tests.support.contrast import GROUNDS, contrast
from tests.support.reports import lines_of, with_heads


@pytest.mark.slow
def test_the_retention_curve_goes_through_what_was_measured(policies):
    (axes,) = retention_figure(policies).axes
    drawn = lines_of(axes)
    retention = {point["tokens"]: point["agreement"] for point in policies[0].evidence["retention"]}
    assert dict(zip(*drawn["chosen"], strict=True)) == {**retention, 8: 1.0}
    (bars,) = axes.containers
    ends = {x: (low, high) for (x, low), (_, high) in bars.lines[2][0].get_segments()}
    for point in policies[0].evidence["retention"]:
        assert ends[point["tokens"]] == pytest.approx(tuple(point["interval"]))
    there = [name for name in CONTROLS if name != "grid"]  # query tokens have none
    for name in there:
        rows = [next(row for row in policy.evidence["candidates"] if row["name"] == name) for policy in policies]
        agreed = dict(zip((6, 4, 2), (row["check"]["agreement"] for row in rows), strict=True))
        assert dict(zip(*drawn[name], strict=True)) == {**agreed, 8: 1.0}
    assert drawn.keys() == {"chosen", *there} and len(set(retention.values())) > 1
    assert axes.get_xlabel() and axes.get_ylabel()


def test_one_budget_is_a_point_and_no_line_to_the_unpruned_model(policies):
    record = policies[0].to_dict()
    record["evidence"]["retention"] = record["evidence"]["retention"][:1]
    (axes,) = retention_figure([PruningPolicy.from_dict(record)]).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert all(line.get_linestyle() == "None" for name, line in lines.items() if name in ("chosen", *CONTROLS))
    assert lines["no pruning"].get_xydata().tolist() == [[8, 1.0]]
    point = record["evidence"]["retention"][0]
    (bars,) = axes.containers
    assert bars.lines[0].get_xydata().tolist() == [[point["tokens"], point["agreement"]]]
    assert bars.lines[0].get_linestyle() == "None"
    assert "logarithmic" in axes.get_xlabel() and axes.get_xscale() == "log"


def test_the_layer_figure_shows_each_layer_alone_and_the_choice(policies):
    (axes,) = layer_figure(policies).axes
    dashed = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert dashed == [point["agreement"] for point in policies[0].evidence["retention"]]
    assert len(set(dashed)) == 3, "or this proves little"
    for policy, bars in zip(policies, axes.containers, strict=True):
        assert bars.get_label() == f"keep {policy.keep}"
        rows = {row["name"]: row["check"] for row in policy.evidence["candidates"]}
        layers, agreed = bars.lines[0].get_data()
        assert np.array(layers, float).round().tolist() == [0, 1]
        assert list(agreed) == [rows["catp layer 0"]["agreement"], rows["catp layer 1"]["agreement"]]
        for layer, ((_, low), (_, high)) in enumerate(bars.lines[2][0].get_segments()):
            assert (low, high) == pytest.approx(tuple(rows[f"catp layer {layer}"]["interval"]))


def test_the_heatmaps_are_signed_and_centred_at_zero(policies):
    weights, _colours = head_figure([with_heads(policies[0])]).axes
    (image,) = weights.images
    assert image.get_array().tolist() == [[0.25, 0.0, -0.5, 0.125]]
    assert image.get_clim() == (-0.5, 0.5)
    assert [label.get_text() for label in weights.get_yticklabels()] == ["1"]  # the chosen layer
    assert [text.get_text() for text in weights.texts] == ["0.25", "-0.5", "0.12"]  # what is zero stays blank
    found = [axes for axes in RankCorrelation.figure(policies[0].evidence["rank_correlation"]).axes if axes.images]
    assert [axes.get_title() for axes in found] == list(policies[0].evidence["rank_correlation"])
    for axes, matrix in zip(found, policies[0].evidence["rank_correlation"].values(), strict=True):
        assert axes.images[0].get_array().tolist() == matrix
        assert axes.images[0].get_clim() == (-1, 1)


def test_a_bar_stands_for_each_slot(policies):
    (axes,) = slot_figure(policies).axes
    assert [bar.get_height() for bar in axes.patches] == policies[0].evidence["fitted"]["slots"]
    assert len(axes.patches) == 8


@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize("draw", [retention_figure, layer_figure], ids=lambda draw: draw.__name__)
def test_every_line_stands_out_from_the_ground(policies, draw, ground):
    colours = {to_hex(line.get_color()) for line in draw(policies).axes[0].lines}
    assert len(colours) > 2 and min(contrast(colour, ground) for colour in colours) >= 3
