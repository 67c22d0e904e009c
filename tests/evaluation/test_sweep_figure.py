"""The plot of a sweep."""

import numpy as np
import pytest

from catp_lightning.evaluation.comparison import Comparison, Result
from catp_lightning.evaluation.sweep.figure import GREYS, SHADES, figure
from catp_lightning.evaluation.sweep.table import ModelTable
from tests.support.contrast import GROUNDS, contrast


def test_one_token_and_everything_are_two_budgets_in_a_table_and_a_plot() -> None:
    same = np.array([1.0, 0.0, 1.0])
    results = [Result("no pruning", None, None, np.ones(3), 32.0), Result("a", 1, None, same, 1.0)]
    results += [Result("a", 1.0, None, np.ones(3), 32.0), Result("b", 1, None, 1 - same, 0.0, 8.0)]
    found = ModelTable.of("m", "3 questions.", Comparison([1, 2, 3], "a", results), {}, {})
    assert [(row["method"], row["keep"], row["agreement"]) for row in found.at(1)[1:]] == [
        ("a", 1, pytest.approx(2 / 3)),
        ("b", 1, pytest.approx(1 / 3)),
    ]
    assert [(row["method"], row["agreement"]) for row in found.at(1.0)[1:]] == [("a", 1.0)]
    assert [repr(keep) for keep in found.budgets] == ["1", "1.0"]
    lines = {line.get_label(): line for line in figure([found]).axes[0].get_lines()}
    assert list(lines["a"].get_xdata()) == [1, 32] and list(lines["b"].get_xdata()) == [8], "0 is on no log axis"


@pytest.mark.parametrize("budgets", [(4,), (4, 8)])
def test_the_band_of_the_reference_is_seen_whole(budgets: tuple[int, ...]) -> None:
    same = np.array([1.0, 0.0, 1.0, 1.0] * 2)
    results = [Result("no pruning", None, None, np.ones(8), 32.0)]
    results += [Result(name, keep, None, same, float(keep)) for name in ("a", "b") for keep in budgets]
    table = ModelTable.of("m", "8 questions.", Comparison(range(8), "a", results), {}, {})
    (axes,) = figure([table]).axes
    bottom, top = axes.get_ylim()
    _band, ends = axes.collections  # of one budget a band has no width
    for row, segment in zip((row for row in table.rows if row["method"] == "a"), ends.get_segments(), strict=True):
        low, high = row["agreement_interval"]
        assert segment[:, 1].tolist() == pytest.approx([low, high]) and high - low > 0.3
        assert bottom < low and high < top
    assert "logarithmic" in axes.get_xlabel() and axes.get_xscale() == "log"


@pytest.mark.parametrize("ground", GROUNDS)
def test_every_colour_of_a_method_stands_out_from_the_ground(ground: str) -> None:
    assert min(contrast(colour, ground) for colour in (*SHADES, *GREYS)) >= 3
