"""Policies of several stages: their file, what is refused, and how many tokens each layer reads."""

import json
from pathlib import Path
from typing import Any

import pytest

from catp_lightning import PolicyError, PruningPolicy, Stage
from catp_lightning.methods.schedule import visits

EXIT = Stage("visual-exit", {"layer": 10})
SCHEDULE = PruningPolicy(
    "fastervlm", keep=0.5, then=[Stage("fastv", {"layer": 4}, keep=16), EXIT], budget={"prefill_flops": 0.25}
)


def test_a_schedule_loads_as_it_was_saved(tmp_path: Path) -> None:
    file = SCHEDULE.save(tmp_path / "policy.json")
    assert PruningPolicy.load(file) == SCHEDULE and hash(PruningPolicy.load(file)) == hash(SCHEDULE)
    written = json.loads(file.read_text())
    assert [stage["scorer"] for stage in written["stages"]] == ["fastervlm", "fastv", "visual-exit"]
    assert [stage["keep"] for stage in written["stages"]] == [{"share": 0.5}, {"tokens": 16}, {"share": 0.5}]
    assert "scorer" not in written and written["format_version"] == 2
    assert repr(SCHEDULE) == (
        "PruningPolicy(scorer='fastervlm', keep=0.5, then=[fastv at 16, visual-exit at 0.5], "
        "budget={'prefill_flops': 0.25})"
    )


def test_a_file_of_version_1_loads_as_one_stage(tmp_path: Path) -> None:
    old = {"scorer": "catp", "scorer_args": {"layers": [0]}, "selector": "dpp", "selector_args": {}}
    old |= {"keep": {"tokens": 8}, "positions": "original", "model": None, "routes": None, "evidence": {}}
    file = tmp_path / "policy.json"
    file.write_text(json.dumps(old | {"format_version": 1}))
    expected = PruningPolicy("catp", {"layers": [0]}, "dpp", keep=8)
    assert PruningPolicy.load(file) == expected and PruningPolicy.load(file, keep=8) == expected
    assert len(expected.stages) == 1 and PruningPolicy.load(expected.save(tmp_path / "new.json")) == expected


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"stages": []}, r"stages is \[\]; it is a list of at least one"),
        ({"stages": [{"scorer": "catp"}], "keep": {"share": 0.5}}, "beside keep; it is a list"),
        ({"stages": [{"keep": {"share": 0.5}}]}, "a stage is .*; it is a dictionary with scorer and"),
        ({"stages": [{"scorer": "catp", "layer": 3}]}, "a stage is .*; it is a dictionary with scorer and"),
        ({"stages": [{"scorer": "catp"}, {"scorer": "fast"}]}, "There is no scorer 'fast'"),
        ({"stages": [{"scorer": "catp"}, {"scorer": 3}]}, "scorer and selector are names, got 3"),
        ({"scorer": "catp", "then": [{"scorer": "fastv", "keep": 0}]}, "keep is 0"),
        ({"scorer": "catp", "then": 3}, "then is 3; it is a list of Stage"),
        ({"scorer": "catp", "budget": {"flops": 0.5}}, "budget is in 'flops'; .* in one of tokens, tokens_per_layer"),
        ({"scorer": "catp", "budget": {"tokens": 1.5}}, r"budget is 1\.5 of tokens; .* above 0 and at most 1"),
        ({"scorer": "catp", "budget": {"tokens": 0.5, "cache_bytes": 0.5}}, "budget is .*a share of what the unpruned"),
    ],
)
def test_damaged_stages_are_refused_by_what_is_wrong(values: dict[str, Any], says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        PruningPolicy.from_dict(values)


def test_a_schedule_has_no_single_budget_to_change() -> None:
    with pytest.raises(PolicyError, match="has 3 stages, each with a budget of its own"):
        SCHEDULE.with_keep(0.25)


def test_each_layer_reads_what_the_stages_before_it_left() -> None:
    assert visits(SCHEDULE.steps(), tokens=64, depth=12) == (32,) * 4 + (16,) * 6 + (0,) * 2
    left_out = PruningPolicy("divprune", keep=0.5, then=[Stage("visual-exit", {"layer": 4}, keep=1.0)])
    assert visits(left_out.steps(), tokens=64, depth=8) == (32,) * 8, "as in pruning"
    pyramid = PruningPolicy("divprune", keep=0.5, then=[Stage("pyramiddrop", keep=0.125)])
    assert visits(pyramid.steps(), tokens=64, depth=8) == (32, 32, 32, 32, 16, 16, 8, 8), "counts of the whole prompt"


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (PruningPolicy("fastv", {"layer": 4}, then=[Stage("fastv", {"layer": 2})]), "'fastv' drops them at layer 4 of"),
        (PruningPolicy("fastv", {"layer": 4}, then=[Stage("divprune")]), "'divprune' after it at layer 0"),
        (PruningPolicy("divprune", then=[Stage("stride")]), "'divprune' drops them at layer 0 of 12"),
        (PruningPolicy("sparsevlm", {"schedule": "rank"}), "how many tokens 'sparsevlm' keeps depends on the prompt"),
    ],
)
def test_descending_stages_and_counts_that_no_budget_tells_are_refused(policy: PruningPolicy, says: str) -> None:
    with pytest.raises(PolicyError, match=f"(?i){says}"):
        visits(policy.steps(), tokens=64, depth=12)
