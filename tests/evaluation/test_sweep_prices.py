"""Budgets of tokens that pay a price, and tables and plots at equal prices."""

import numpy as np
import pytest
import torch

from catp_lightning.errors import PolicyError
from catp_lightning.evaluation.comparison import Comparison, Result
from catp_lightning.evaluation.sweep.priced_figure import priced_figure
from catp_lightning.evaluation.sweep.priced_table import PricedTable, verdict
from catp_lightning.evaluation.sweep.prices import Price, Sizes, Solver, prices_asked, schedule_text
from catp_lightning.policy import PruningPolicy, Stage
from catp_lightning.pricing import Prices
from catp_lightning.pricing.layers import Stored, Work
from catp_lightning.pruning.record import Prefill

DEPTH = 4
PRICES = Prices("decoder", DEPTH, (False,) * DEPTH, (Work(100, 0, 4),) * DEPTH, (Stored(8),) * DEPTH)
SIZES = [[10, 36, 3], [12, 144, 5], [10, 400, 1]]


def spent(unit: str, keep: float, first: int = 0) -> float:
    """Share that is paid where tokens leave at layer `first`, by hand."""

    def cost(text: int, read: int) -> float:
        rows = text + read
        return {"tokens_per_layer": read, "cache_bytes": 8 * rows, "prefill_flops": 100 * rows + 4 * rows**2}[unit]

    left = full = 0.0
    for text, tokens, times in SIZES:
        stay = max(1, int(np.ceil(keep * tokens - 1e-9)))
        left += times * (first * cost(text, tokens) + (DEPTH - first) * cost(text, stay))
        full += times * DEPTH * cost(text, tokens)
    return left / full


@pytest.mark.parametrize("unit", ["tokens_per_layer", "cache_bytes", "prefill_flops"])
@pytest.mark.parametrize("share", [0.5, 0.25])
def test_the_largest_share_that_pays_a_price_is_found(unit: str, share: float) -> None:
    solver = Solver(PRICES, SIZES)
    policy = solver.solve(PruningPolicy("stride"), Price(unit, share))  # type: ignore[arg-type]
    assert policy is not None
    keep = float(policy.keep)
    assert solver.share(unit, policy) == pytest.approx(spent(unit, keep))  # type: ignore[arg-type]
    assert spent(unit, keep) <= share + 1e-9
    more = min(k / tokens for _, tokens, _ in SIZES for k in range(1, tokens + 1) if k / tokens > keep + 1e-6)
    same = [np.ceil(keep * tokens - 1e-9) == np.ceil(more * tokens - 1e-9) for _, tokens, _ in SIZES]
    assert all(same) or spent(unit, more + 1e-6) > share, "one more token is too much"


def test_a_method_that_reads_everything_first_keeps_less_for_the_same_price() -> None:
    solver, price = Solver(PRICES, SIZES), Price("tokens_per_layer", 0.5)
    late = solver.solve(PruningPolicy("fastv", {"layer": 1}), price)
    early = solver.solve(PruningPolicy("stride"), price)
    assert late is not None and early is not None and late.keep < early.keep
    assert spent("tokens_per_layer", float(late.keep), first=1) == pytest.approx(0.5, abs=0.01)
    assert solver.solve(PruningPolicy("fastv", {"layer": 2}), price) is None
    least = spent("tokens_per_layer", 1e-9, first=2)
    said = solver.why_not(PruningPolicy("fastv", {"layer": 2}), price=price)
    assert said == f"with one token it pays {least:.3g} of tokens_per_layer already."


def test_visual_tokens_leave_at_the_last_layer_that_does_not_exceed_the_price() -> None:
    solver = Solver(PRICES, SIZES)
    found = [solver.solve(PruningPolicy("visual-exit"), Price("tokens_per_layer", share)) for share in (0.8, 0.5, 0.2)]
    assert [one and one.scorer_args["layer"] for one in found] == [3, 2, None]


def test_prompts_are_counted_with_what_each_layer_read() -> None:
    layers = torch.tensor([[36, 36, 9, 9], [144, 36, 36, 36], [36, 36, 9, 9]])
    counts, text = torch.tensor([36, 144, 36]), torch.tensor([10, 12, 10])
    keep = torch.ones(3, 144, dtype=torch.bool)
    sizes = Sizes.of([Prefill(keep, counts, layers, text=text)])
    assert sizes.to_json() == [[10, 36, 2], [12, 144, 1]]
    paid = sizes.paid(PRICES)
    assert paid["tokens"] == pytest.approx((9 + 36 + 9) / 216)
    assert paid["tokens_per_layer"] == pytest.approx(float(layers.sum()) / 4 / 216)
    assert paid["cache_bytes"] == pytest.approx((int(layers.sum()) + 4 * 32) / (4 * (216 + 32)))
    with pytest.raises(PolicyError, match="cross-attention"):
        Sizes.of([Prefill(keep, counts, layers)])


@pytest.mark.parametrize("budget", [{}, {"tokens": []}, {"tokens": [0.5, 0.5]}, {"tokens": 0.0}, {"prefill_time": 0.5}])
def test_prices_that_make_no_sense_are_refused(budget: dict[str, object]) -> None:
    with pytest.raises(PolicyError, match="budget is"):
        prices_asked(budget)


def test_schedules_are_told_in_a_few_words() -> None:
    policy = PruningPolicy("fastervlm", keep=0.5, then=[Stage("fastv", {"layer": 3}, keep=0.1)])
    assert schedule_text(policy, 12, named=True) == "fastervlm 0.5, fastv 0.1 at layer 3"
    assert schedule_text(PruningPolicy("visual-exit", {"layer": 4}), 12, named=True) == "none at layer 4"


def priced_table() -> PricedTable:
    rng = np.random.default_rng(0)
    units = ("tokens", "tokens_per_layer", "prefill_flops", "cache_bytes")

    def result(method: str, share: float, wrong: float) -> Result:
        same = (rng.random(60) > wrong).astype(float)
        paid = dict.fromkeys(units, share - 0.01)
        return Result(method, 0.3, None, same, 9.0, None, {"prefill_flops": share}, f"{share}", paid)

    full = Result("no pruning", None, None, np.ones(60), 36.0, prices=dict.fromkeys(units, 1.0))
    found = [full]
    for share in (0.25, 0.5):
        found += [result("calibrated", share, 0.05), result("bad", share, 0.6), result("as good", share, 0.05)]
    return PricedTable.of("m", "60 questions.", Comparison(range(60), "calibrated", found), {"bad": False}, {})


def test_methods_are_compared_at_one_price_with_a_verdict() -> None:
    table = priced_table()
    assert table.budgets == [{"prefill_flops": 0.5}, {"prefill_flops": 0.25}], "the largest first"
    rows = {row["method"]: row for row in table.at({"prefill_flops": 0.25})[1:]}
    assert rows.keys() == {"calibrated", "bad", "as good"}
    assert verdict(rows["bad"]) == "ahead" and verdict(rows["as good"]) == "level"
    assert verdict({"reference_ahead_interval": [-0.3, -0.1]}) == "behind"
    part = table.markdown().partition("## 0.25 of prefill_flops\n\n")[2]
    assert [line.split(" | ")[-1].split()[-2] for line in part.splitlines() if "| bad" in line] == ["ahead"]


def test_every_method_is_in_the_plot_at_what_it_paid_with_its_interval() -> None:
    table = priced_table()
    (axes,) = priced_figure([table]).axes
    drawn = dict(zip(axes.get_legend_handles_labels()[1], axes.containers, strict=True))
    assert drawn.keys() == {"calibrated", "bad", "as good"}
    line = drawn["calibrated"].lines[0]
    assert list(line.get_xdata()) == pytest.approx([0.24, 0.49]) and line.get_linestyle() == "-"
    rows = [row for share in (0.25, 0.5) for row in table.at({"prefill_flops": share}) if row["method"] == "calibrated"]
    assert list(line.get_ydata()) == pytest.approx([1 - row["agreement"] for row in rows])
    assert drawn["bad"].lines[0].get_linestyle() == "None"
