"""Published methods of several stages in `catp sweep --budget`: each pays a price, or a note says why it does not."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catp_lightning.cli.main import main
from catp_lightning.evaluation.sweep.methods import fixed_methods, named
from catp_lightning.evaluation.sweep.prices import Price, Solver
from catp_lightning.models import find_family
from catp_lightning.policy import SCHEDULES, PruningPolicy, Stage
from catp_lightning.pricing import Prices
from catp_lightning.pricing.layers import Stored, Work
from tests.support.families import BY_NAME
from tests.support.rows import Row
from tests.support.stages import LLAMA, OPT, deep
from tests.support.sweeps import sweep

DEPTH, SIZES = 4, [[10, 36, 3], [12, 144, 5], [10, 400, 1]]
PRICES = Prices("decoder", DEPTH, (False,) * DEPTH, (Work(100, 0, 4),) * DEPTH, (Stored(8),) * DEPTH)
SECOND = 2  # layer of the second stage of both schedules


def schedule_of(name: str) -> Callable[[float], PruningPolicy]:
    return partial(PruningPolicy.schedule, name, depth=DEPTH)


def spent(unit: str, early: float, late: float, more: int = 0) -> float:
    """Share that two stages pay by hand; `more`: with so many tokens more in each prompt and stage."""

    def cost(text: int, read: int) -> float:
        rows = text + read
        return {"tokens_per_layer": read, "cache_bytes": 8 * rows, "prefill_flops": 100 * rows + 4 * rows**2}[unit]

    left = full = 0.0
    for text, tokens, times in SIZES:
        first, second = (more + max(1, int(np.ceil(keep * tokens - 1e-9))) for keep in (early, late))
        left += times * (SECOND * cost(text, first) + (DEPTH - SECOND) * cost(text, second))
        full += times * DEPTH * cost(text, tokens)
    return left / full


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("unit", ["tokens_per_layer", "cache_bytes", "prefill_flops"])
@pytest.mark.parametrize("share", [0.5, 0.125])
def test_a_schedule_pays_a_price_and_one_token_more_would_be_too_much(name: str, unit: Any, share: float) -> None:
    schedule = schedule_of(name)
    policy = Solver(PRICES, SIZES).solve(schedule(0.5), Price(unit, share), schedule)
    assert policy is not None and [stage.scorer for stage in policy.stages] == [s.scorer for s in schedule(0.5).stages]
    early, late = (float(stage.keep) for stage in policy.stages)
    assert late / early == pytest.approx({"vscan": 1 / 3, "divprune+fastv": 1 / 2}[name])
    assert spent(unit, early, late) <= share + 1e-9 < spent(unit, early, late, more=1)


def test_what_one_policy_keeps_for_a_price_is_not_taken_for_another() -> None:
    def other(keep: float) -> PruningPolicy:
        return PruningPolicy("divprune", keep=keep, then=[Stage("fastv", {"layer": 1}, keep=keep / 8)])

    schedules = [None, schedule_of("vscan"), schedule_of("divprune+fastv"), other]
    policies = [PruningPolicy("divprune"), *(one(0.5) for one in schedules if one)]
    price, together = Price("tokens_per_layer", 0.25), Solver(PRICES, SIZES)
    for _ in range(2):
        pairs = list(zip(policies, schedules, strict=True))
        found = [together.solve(policy, price, schedule) for policy, schedule in pairs]
        assert found == [Solver(PRICES, SIZES).solve(policy, price, schedule) for policy, schedule in pairs]
        assert len({repr([stage.keep for stage in one.stages]) for one in found if one}) == 4


def test_a_schedule_that_exceeds_a_price_with_one_token_is_told_what_it_pays() -> None:
    least, solver = spent("cache_bytes", 1e-9, 1e-9), Solver(PRICES, SIZES)
    for name in SCHEDULES:
        schedule = schedule_of(name)
        price = Price("cache_bytes", least - 1e-3)
        assert solver.solve(schedule(0.5), price, schedule) is None
        said = solver.why_not(schedule(0.5), price=price)
        assert said == f"with one token it pays {least:.3g} of cache_bytes already."
        assert solver.solve(schedule(0.5), Price("cache_bytes", least + 1e-9), schedule) is not None


def test_models_that_cannot_run_a_schedule_have_the_reason() -> None:
    def tried(row: Row) -> tuple[list[str], dict[str, str]]:
        found, why = fixed_methods(list(SCHEDULES), find_family(row.model()), True)
        return [job.title for job in found], why

    assert tried(LLAMA) == (list(SCHEDULES), {})
    found, why = tried(deep(BY_NAME["Llava"], 2))
    assert not found and why.keys() == set(SCHEDULES) and "depth is 2" in why["vscan"]
    found, why = tried(OPT)
    assert found == ["divprune+fastv"] and "vision-attention" in why["vscan"]
    found, why = tried(BY_NAME["Mllama"])
    assert not found and "cross-attention" in why["divprune+fastv"]


@pytest.mark.slow
def test_schedules_are_rows_with_files_of_their_own_and_notes(tmp_path: Path) -> None:
    args = ["--models", "digits_blip2", "--scorers", "stride,vscan,divprune+fastv", "--questions", 8]
    args += ["--budget", '{"tokens_per_layer": [0.9, 0.8, 0.25, 0.01]}']
    folder = sweep(tmp_path, *args) / "digits_blip2"
    table = json.loads((folder / "prices.json").read_text())
    rows = {row["budget"]["tokens_per_layer"]: row for row in table["rows"] if row["method"] == "divprune+fastv"}
    one_token = 1 / 32
    assert rows.keys() == {0.9, 0.8, 0.25}
    for share, row in rows.items():
        assert share - 1.5 * one_token < row["prices"]["tokens_per_layer"] <= share, "a token in each stage, at most"
    assert [len(row["schedules"][0].split(", ")) for row in rows.values()] == [1, 1, 2], "above 0.6 the second is alone"
    assert rows[0.9]["schedules"] != rows[0.8]["schedules"]
    assert {row["method"] for row in table["rows"]} == {"no pruning", "stride", "divprune+fastv"}
    assert table["notes"]["divprune+fastv at 0.01 of tokens_per_layer"].startswith("with one token it pays 0.0312")
    assert "vision-attention" in table["notes"]["vscan"]
    jobs = {path: path.stat().st_mtime_ns for path in (folder / "priced-jobs").glob("*.json")}
    assert len([path for path in jobs if path.name.startswith("divprune-fastv-then-")]) == 3
    sweep(tmp_path, *args)
    assert {path: path.stat().st_mtime_ns for path in jobs} == jobs, "finished jobs are not run again"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--keep", "0.5", "--scorers", "stride,vscan"], "vscan has several stages, and its budget is what layers"),
        (["--budget", '{"tokens": 0.5}', "--scorers", "vscam"], "no scorer 'vscam'; known are"),
        (["--budget", '{"tokens": 0.5}', "--scorers", "divprune+fast"], "Did you mean 'divprune+fastv'?"),
    ],
)
def test_a_schedule_at_keep_and_an_unknown_one_are_refused(args: list[str], said: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["sweep", "--models", "digits_blip2", "--output", str(tmp_path), *args])
    assert said in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.rglob("*.json"))


def test_all_methods_at_prices_are_schedules_too() -> None:
    assert set(SCHEDULES) <= set(named(["all"], priced=True)) and not set(SCHEDULES) & set(named(["all"]))
