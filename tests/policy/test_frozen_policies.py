"""A policy is what was checked: nothing in it can be changed, and everything that copies or sends one still works."""

import copy
import dataclasses
import io
import json
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import catp_lightning
from catp_lightning import PolicyError, PruningPolicy, prune
from catp_lightning.calibration.search.candidate import Candidate
from catp_lightning.policy.frozen import LARGEST, MAX_VALUES, FrozenDict, FrozenList
from catp_lightning.policy.typed import LAYERS, NUMBERS
from tests.support.models import random_blip2

POLICY = PruningPolicy(
    "catp",
    {"layers": [0, -1], "head_weights": [[1.0, -0.5], [0, 2]]},
    "dpp",
    {"relevance": -1.5},
    keep=0.25,
    model={"type": "blip-2", "shape": {"layers": [1, 2]}},
    evidence={"chosen": "something", "candidates": [{"name": "a", "interval": [0.1, 0.2]}]},
)
CHANGES: dict[str, Callable[[Any], Any]] = {
    "set": lambda d: d.__setitem__("x", 1),
    "delete": lambda d: d.__delitem__(next(iter(d))),
    "update": lambda d: d.update(x=1),
    "setdefault": lambda d: d.setdefault("x", 1),
    "pop": lambda d: d.pop(next(iter(d))),
    "popitem": lambda d: d.popitem(),
    "clear": lambda d: d.clear(),
    "merge": lambda d: d.__ior__({"x": 1}),
}
LIST_CHANGES: dict[str, Callable[[Any], Any]] = {
    "set": lambda x: x.__setitem__(0, 1),
    "slice": lambda x: x.__setitem__(slice(None), []),
    "delete": lambda x: x.__delitem__(0),
    "append": lambda x: x.append(1),
    "extend": lambda x: x.extend([1]),
    "insert": lambda x: x.insert(0, 1),
    "pop": lambda x: x.pop(),
    "remove": lambda x: x.remove(x[0]),
    "clear": lambda x: x.clear(),
    "sort": lambda x: x.sort(),
    "reverse": lambda x: x.reverse(),
    "add": lambda x: x.__iadd__([1]),
    "multiply": lambda x: x.__imul__(2),
}


def dictionaries(policy: PruningPolicy) -> list[Any]:
    assert policy.model is not None
    inside = [policy.model["shape"], policy.evidence["candidates"][0]]
    return [policy.scorer_args, policy.selector_args, policy.model, policy.evidence, *inside]


def lists(policy: PruningPolicy) -> list[Any]:
    assert policy.model is not None
    row = policy.evidence["candidates"][0]
    weights = policy.scorer_args["head_weights"]
    return [policy.scorer_args["layers"], weights, weights[0], policy.model["shape"]["layers"], row["interval"]]


def test_nothing_in_a_policy_can_be_changed() -> None:
    before = json.dumps(POLICY.to_dict())
    for change in CHANGES.values():
        for found in dictionaries(POLICY):
            with pytest.raises(TypeError, match=r"A policy cannot be changed: make another, dataclasses\.replace"):
                change(found)
    for change in LIST_CHANGES.values():
        for found in lists(POLICY):
            with pytest.raises(TypeError, match="A policy cannot be changed"):
                change(found)
    with pytest.raises(dataclasses.FrozenInstanceError):
        POLICY.keep = 1  # type: ignore[misc]
    assert json.dumps(POLICY.to_dict()) == before


COPIES: dict[str, Callable[[PruningPolicy], PruningPolicy]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "replace": lambda policy: dataclasses.replace(policy, positions="original"),
    "with_keep": lambda policy: policy.with_keep(policy.keep),
    "json": lambda policy: PruningPolicy.from_dict(json.loads(json.dumps(policy.to_dict()))),
    "fields": lambda policy: PruningPolicy(**dataclasses.asdict(policy)),
    **{f"pickle {n}": lambda policy, n=n: pickle.loads(pickle.dumps(policy, n)) for n in range(6)},
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_equal_has_the_same_hash_and_cannot_be_changed_either(way: str) -> None:
    other = COPIES[way](POLICY)
    assert other == POLICY and hash(other) == hash(POLICY) and other.to_dict() == POLICY.to_dict()
    assert all(type(found) is FrozenDict for found in dictionaries(other))
    assert all(type(found) is FrozenList for found in lists(other))


def test_what_to_dict_gives_is_plain_and_may_be_changed() -> None:
    values = POLICY.to_dict()
    (stage,) = values["stages"]
    stage["scorer_args"]["layers"].append(1)
    stage["scorer_args"]["head_weights"].append([0.0, 0.0])
    assert PruningPolicy.from_dict(values).scorer_args["layers"] == [0, -1, 1]
    file = io.BytesIO()
    torch.save({"catp_policy": POLICY.to_dict()}, file)
    file.seek(0)
    assert PruningPolicy.from_dict(torch.load(file, weights_only=True)["catp_policy"]) == POLICY


def test_policies_of_equal_content_are_one_in_a_set_and_others_are_not() -> None:
    others = [POLICY.with_keep(0.5), dataclasses.replace(POLICY, evidence={}), dataclasses.replace(POLICY, model=None)]
    assert len({POLICY, copy.deepcopy(POLICY), *others}) == 4
    assert Candidate("x", "catp", POLICY.scorer_args).policy(1.0).scorer_args == POLICY.scorer_args


@pytest.mark.slow
def test_a_policy_goes_to_a_process_that_is_started_anew() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(copy.copy, (POLICY,)) == POLICY


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"evidence": {"x": [[]] * MAX_VALUES}}, r"is too large: a policy holds at most 262,144 values, of 4 MiB"),
        ({"evidence": {"x": "a" * (LARGEST + 1)}}, "is too large"),
        ({"evidence": {"x": "\u20ac" * (LARGEST // 2)}}, "This policy is too large"),
        ({"evidence": {str(n): 0 for n in range(MAX_VALUES)}}, "is too large"),
        ({"scorer_args": {"layers": [0] * 10**6}}, "is too large"),
        ({"scorer_args": {"layers": [0] * (LAYERS + 1)}}, r"layers of scorer 'catp' has 1,025 entries; at most 1,024"),
        ({"scorer_args": {"slot_weights": [0.5] * (NUMBERS + 1)}}, r"has 65,537 entries; at most 65,536"),
        ({"scorer_args": {"head_weights": [[0.5]] * (LAYERS + 1)}}, r"has 1,025 entries; at most 1,024"),
    ],
)
def test_what_no_model_has_use_for_is_refused_before_it_is_worked_on(values: dict[str, Any], says: str) -> None:
    for make in (PruningPolicy.from_dict, lambda values: PruningPolicy(**values)):
        with pytest.raises(PolicyError, match=says) as error:
            make(values)
        assert len(str(error.value)) < 500


def test_what_refers_to_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    doubled: Any = []
    for _ in range(50):
        doubled = [doubled, doubled]
    for value in (endless, doubled):
        for make in (PruningPolicy.from_dict, lambda values: PruningPolicy(**values)):
            with pytest.raises(PolicyError, match=r"too large|nested deeper"):
                make({"evidence": {"x": value}})


def test_many_unknown_keys_take_no_longer_than_reading_them() -> None:
    with pytest.warns(UserWarning, match="does not know: k0, k1"):
        assert PruningPolicy.from_dict({f"k{n}": 0 for n in range(200_000)}) == PruningPolicy()


def test_as_many_weights_as_are_allowed_are_read_at_once() -> None:
    weights = [float(n) for n in range(NUMBERS)]
    policy = PruningPolicy("position", {"weights": weights})
    assert policy.build_scorer().weights == tuple(weights)  # type: ignore[attr-defined]


def test_the_repr_of_a_policy_is_short_whatever_was_found() -> None:
    assert repr(PruningPolicy(keep=1)) == "PruningPolicy(scorer='catp', keep=1)"
    evidence = {"chosen": "x" * 1000, "candidates": [{"name": "y"}] * 1000}
    model = {f"key {n}": "z" * 1000 for n in range(100)}
    args = {"layers": [*range(100)], "head_weights": [[0.123456789] * 100] * 100}
    shown = repr(PruningPolicy("catp", args, keep=0.25, positions="compact", model=model, evidence=evidence))
    assert shown.startswith("PruningPolicy(scorer='catp', keep=0.25, scorer_args={")
    assert "evidence=<2 entries, chosen 'xxx" in shown and len(shown) < 1000
    assert "\x1b" not in repr(PruningPolicy(evidence={"chosen": "\x1b[31m"}))


def test_the_repr_of_a_record_says_what_was_kept() -> None:
    model, inputs = random_blip2()
    policy = PruningPolicy("stride", keep=2, evidence={"long": [1] * 1000})
    with torch.no_grad(), prune(model, policy) as pruning:
        assert repr(pruning).endswith("scorer='stride', keep=2: nothing read yet)")
        model(**inputs)
    expected = "Pruning(Blip2ForConditionalGeneration, scorer='stride', keep=2: 6 visual tokens kept of a batch of 3)"
    assert repr(pruning) == expected


def test_the_package_says_its_version() -> None:
    from importlib.metadata import version

    assert catp_lightning.__version__ == version("catp-lightning")
