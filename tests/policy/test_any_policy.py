"""Whatever arguments a policy is made of: it is read back exactly, or refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from catp_lightning import PolicyError, PruningError, PruningPolicy, prune
from catp_lightning.policy.frozen import DEEPEST
from tests.support.policy_strategies import JUNK, KEEP, MODEL, ON_BLIP2, PLAIN, TEXT, exact, rules


@pytest.mark.slow
@given(rule=rules(junk=False), keep=KEEP, evidence=st.dictionaries(TEXT, PLAIN))
def test_a_policy_of_any_method_and_any_typed_arguments_is_read_back_to_the_last_bit(
    folder: Path, rule: dict[str, Any], keep: float, evidence: dict[str, Any]
) -> None:
    try:
        policy = PruningPolicy(keep=keep, evidence=evidence, **rule)
    except PolicyError:
        return
    same = PruningPolicy.from_dict(policy.to_dict())
    loaded = PruningPolicy.load(policy.save(folder / "policy.json"))
    for other in (same, loaded):
        assert other == policy and exact(other) == exact(policy)
        assert type(other.keep) is type(keep) and other.keep == keep
        assert other.build_scorer() == policy.build_scorer() and other.build_selector() == policy.build_selector()


@pytest.mark.slow
@given(rule=rules(junk=True), more=st.dictionaries(st.sampled_from(["keep", "positions", "model", "evidence"]), JUNK))
def test_arguments_of_any_kind_make_a_policy_or_a_policy_error(rule: dict[str, Any], more: dict[str, Any]) -> None:
    try:
        policy = PruningPolicy(**{**rule, **more})
    except PolicyError:
        return
    assert exact(PruningPolicy.from_dict(policy.to_dict())) == exact(policy)


@pytest.mark.slow
@settings(max_examples=60)
@given(
    rule=rules(junk=False, scorers=ON_BLIP2), keep=st.floats(0.01, 1) | st.integers(1, 9) | st.integers(1, 2**63 - 1)
)
def test_what_is_accepted_prunes_or_is_refused_when_the_model_is_known(rule: dict[str, Any], keep: float) -> None:
    model, inputs = MODEL
    try:
        policy = PruningPolicy(keep=keep, **rule)
        with torch.no_grad(), prune(model, policy) as pruning:
            model(**inputs)
    except (PolicyError, PruningError, ValueError):  # of weights that are as many as another model's heads: ValueError
        return
    assert pruning.keep is not None
    least = 0 if policy.scorer == "visual-exit" else 1
    assert (pruning.keep.sum(1) >= least).all() and pruning.keep.shape == (3, 8)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"scorer": "sparsevlm", "scorer_args": {"scale": 10**400}},
            "scale of scorer 'sparsevlm' is 1000.*finite number",
        ),
        ({"selector": "dpp", "selector_args": {"relevance": -(10**400)}}, "relevance of selector 'dpp' is -1000"),
        ({"keep": {"share": 10**400}}, "keep is {'share': 1000"),
        ({"keep": {"tokens": 10**400}}, "keep is a number of 1329 bits"),
        ({"scorer": "random", "scorer_args": {"seed": 2**63}}, "seed is 9223372036854775808; it is .* of 64 bits"),
        ({"scorer": "x" * 10**6}, "There is no scorer 'xxx"),
    ],
)
def test_numbers_beyond_all_floats_and_endless_names_are_refused_in_few_words(
    values: dict[str, Any], says: str
) -> None:
    with pytest.raises(PolicyError, match=says) as error:
        PruningPolicy.from_dict(values)
    assert len(str(error.value)) < 2000


def test_a_policy_is_not_changed_by_what_is_done_to_the_dictionaries_it_was_made_of() -> None:
    args: dict[str, Any] = {"layers": [0, 1]}
    policy = PruningPolicy(scorer_args=args)
    args["layers"].append("junk")
    assert policy.scorer_args == {"layers": [0, 1]}


def test_numbers_of_numpy_and_tuples_are_kept_as_json_has_them(folder: Path) -> None:
    policy = PruningPolicy(scorer_args={"layers": (0, 1)}, keep=np.float64(0.25))
    assert type(policy.keep) is float and policy.scorer_args == {"layers": [0, 1]}
    assert PruningPolicy.from_dict(policy.to_dict()) == policy
    from catp_lightning.policy.locations import budget_file_name

    assert budget_file_name(np.float64(0.25)) == "keep-0.25.json"


def nested(depth: int) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = [found]
    return found


def test_evidence_is_as_deep_as_can_be_saved_and_read_and_no_deeper(folder: Path) -> None:
    policy = PruningPolicy(evidence={"x": nested(DEEPEST - 2)})
    assert PruningPolicy.load(policy.save(folder / "deep.json")) == policy
    for depth in (DEEPEST, 400, 10_000):
        with pytest.raises(PolicyError, match=r"nested deeper than|holds a value that JSON cannot hold"):
            PruningPolicy(evidence={"x": nested(depth)})


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("x" * 5000, "cannot be looked up"),
        ("~nobody-of-that-name/policy.json", "cannot be looked up"),
        ("a\0b", "There is no policy at"),
        ("/dev/null", "There is no policy at"),
        ("\ud800.json", "There is no policy at|cannot be looked up"),
    ],
)
def test_a_path_that_no_file_can_have_is_refused_as_any_other(path: str, says: str) -> None:
    for keep in (None, 0.5):
        with pytest.raises(PolicyError, match=says):
            PruningPolicy.load(path, keep=keep)


def test_a_file_that_was_renamed_to_another_budget_is_refused(folder: Path) -> None:
    PruningPolicy(keep=0.25).save(folder / "renamed" / "keep-0.5.json")
    with pytest.raises(PolicyError, match=r"keep-0\.5\.json is for keep=\{'share': 0\.25\}, not 0\.5"):
        PruningPolicy.load(folder / "renamed", keep=0.5)
    (folder / "renamed" / "keep-0.5.json").write_text("[" * 100_000)
    with pytest.raises(PolicyError, match="cannot be read as a policy"):
        PruningPolicy.load(folder / "renamed", keep=0.5)
