"""Policies that know the question, as files hold them: read back as they were, or refused by what is wrong."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from catp_lightning import PolicyError, PruningPolicy, prune
from catp_lightning.methods.question import Question
from catp_lightning.methods.scorers import CrossAttention
from catp_lightning.methods.scorers.base import QuestionWeights
from tests.support.families import BY_NAME
from tests.support.questions import by_question, components, routed
from tests.support.rules import OUTPUTS

ROUTED = PruningPolicy(keep=3, **routed(*OUTPUTS))
WEIGHED = PruningPolicy("cross-attention", by_question([0, 1], 4, 8), keep=3)
BOTH = PruningPolicy(
    keep=3,
    **routed({"scorer": "cross-attention", "scorer_args": by_question([0, 1], 4, 8), "selector": "dpp"}, OUTPUTS[0]),
)


@pytest.mark.parametrize("policy", [ROUTED, WEIGHED, BOTH], ids=["routes", "weights", "both"])
def test_a_loaded_policy_is_equal_and_prunes_as_the_one_in_memory(policy: PruningPolicy, tmp_path: Path) -> None:
    loaded = PruningPolicy.load(policy.save(tmp_path / "policy.json"))
    assert loaded == policy and loaded.method() == policy.method() and hash(loaded.method())
    assert PruningPolicy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    assert len(repr(loaded)) < 1000
    row = BY_NAME["Blip2-OPT"]
    model, inputs, found = row.model(), row.inputs(), []
    for each in (policy, loaded, policy.with_keep(3)):
        with torch.no_grad(), prune(model, each) as pruning:
            found.append((model(**inputs).logits, pruning.keep))
    assert all(torch.equal(logits, found[0][0]) and torch.equal(keep, found[0][1]) for logits, keep in found)


def test_a_policy_of_a_scorer_that_knows_the_question_builds_it_again(tmp_path: Path) -> None:
    weights = QuestionWeights(components(2), (((0.5, -1.0), (0.0, 2.0)),), ((0.25, 0.0), (1.0, -3.0)))
    scorer = CrossAttention(layers=(0,), head_weights=((1.0, 2.0),), question=weights)
    policy = PruningPolicy.of(scorer, keep=3)
    assert policy.build_scorer() == scorer
    assert PruningPolicy.load(policy.save(tmp_path / "policy.json")).build_scorer() == scorer
    assert PruningPolicy.of(CrossAttention()).scorer_args == {}


def test_components_are_encoded_to_the_last_bit_of_float32() -> None:
    rows = np.random.default_rng(0).standard_normal((3, 7)).astype(np.float32)
    question = Question.of(rows, np.array([0.0, 1.0, -2.5]))
    assert np.array_equal(question.rows(), rows) and question.count == 3 and question.offset == (0.0, 1.0, -2.5)
    first = question.first(2)
    assert np.array_equal(first.rows(), rows[:2]) and first.offset == (0.0, 1.0)


def _router(values: dict[str, Any]) -> Any:
    return values["routes"]["router"]


def _set(place: Callable[[dict[str, Any]], Any], name: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        place(values)[name] = value

    return change


NAN = base64.b64encode(np.full((2, 32), np.nan, "<f4").tobytes()).decode()
SHORT = base64.b64encode(np.ones(63, "<f4").tobytes()).decode()
ODD = base64.b64encode(b"12345").decode()
DAMAGED: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (_set(_router, "divergence", [[0.0, 0.0, 0.0]] * 2), "router of routes is for 2 rules; there are 3"),
    (_set(_router, "divergence", [[0.0, 0.0, 0.0]] * 4), "router of routes is for 4 rules; there are 3"),
    (_set(_router, "divergence", []), "divergence needs 3 numbers for each"),
    (_set(_router, "divergence", [[0.0, 0.0]] * 3), "divergence needs 3 numbers for each"),
    (_set(_router, "divergence", [[0.0, "a", 0.0]] * 3), "divergence of the router of routes is 'a'"),
    (_set(_router, "more", 1), "router of routes has no argument 'more'"),
    (_set(_router, "question", None), "question of the router of routes is None"),
    (lambda values: _router(values).pop("question"), "router of routes lacks question"),
    (lambda values: _router(values).pop("divergence"), "router of routes lacks divergence"),
    (lambda values: _router(values)["question"].pop("basis"), "question of the router of routes lacks basis"),
    (_set(lambda values: _router(values)["question"], "basis", "%%"), "basis is not base64"),
    (_set(lambda values: _router(values)["question"], "basis", "ä"), "basis is not base64"),
    (_set(lambda values: _router(values)["question"], "basis", ODD), "basis is not base64 of float32"),
    (_set(lambda values: _router(values)["question"], "basis", SHORT), "basis has 63 numbers"),
    (_set(lambda values: _router(values)["question"], "basis", NAN), "basis has .* finite"),
    (_set(lambda values: _router(values)["question"], "basis", ""), "basis"),
    (_set(lambda values: _router(values)["question"], "basis", 3), "basis of question of the router of routes is 3"),
    (_set(lambda values: _router(values)["question"], "offset", []), "basis has 64 numbers"),
    (_set(lambda values: _router(values)["question"], "offset", [0.0] * 3), "basis has 64 numbers"),
    (_set(lambda values: values["routes"], "router", None), "dictionaries"),
    (_set(lambda values: values["routes"], "router", [1]), "dictionaries"),
    (_set(lambda values: values["routes"], "rules", []), "rules"),
    (_set(lambda values: values["routes"], "rules", "l2-norm"), "rules"),
    (_set(lambda values: values["routes"], "rules", ["l2-norm", "random"]), "dictionaries"),
    (_set(lambda values: values["routes"], "other", 1), "routes has .*other"),
    (_set(lambda values: values, "routes", {}), "routes has"),
    (_set(lambda values: values, "routes", [1]), "routes"),
    (_set(lambda values: values, "routes", 3), "routes"),
    (lambda values: values["routes"]["rules"].pop(), "router of routes is for 3 rules; there are 2"),
    (_set(lambda values: values["routes"]["rules"][0], "keep", 0.5), "rule of routes has .*keep"),
    (_set(lambda values: values["routes"]["rules"][0], "scorer", "l2norm"), "no scorer 'l2norm'"),
    (_set(lambda values: values["routes"]["rules"][0], "scorer", 5), "no scorer 5"),
    (lambda values: values["routes"]["rules"][0].pop("scorer"), "rule of routes lacks scorer"),
    (_set(lambda values: values["routes"]["rules"][0], "selector", "no"), "no selector 'no'"),
    (_set(lambda values: values["routes"]["rules"][0], "scorer_args", [1]), "scorer_args"),
    (_set(lambda values: values["routes"]["rules"][0], "scorer_args", None), "scorer_args"),
    (_set(lambda values: values["routes"]["rules"][0], "selector_args", 3), "selector_args"),
]


@pytest.mark.parametrize(("change", "says"), DAMAGED, ids=[f"{n}: {says}" for n, (_, says) in enumerate(DAMAGED)])
def test_damaged_routes_are_refused_by_what_is_wrong(
    change: Callable[[dict[str, Any]], None], says: str, tmp_path: Path
) -> None:
    values = ROUTED.to_dict()
    change(values)
    file = tmp_path / "policy.json"
    file.write_text(json.dumps(values))
    with pytest.raises(PolicyError, match=says) as refused:
        PruningPolicy.load(file)
    assert len(str(refused.value)) < 1000


def _question(values: dict[str, Any]) -> Any:
    return values["scorer_args"]["question"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set(_question, "heads", [[[0.0, 1.0]] * 4, [[0.0, 1.0]] * 3]), "equally many heads"),
        (_set(_question, "heads", [[[0.0]] * 4] * 2), "need 2 numbers each"),
        (_set(_question, "heads", []), "need 2 numbers each|equally many"),
        (_set(_question, "slots", [[0.0] * 3] * 8), "need 2 numbers each"),
        (_set(_question, "slots", "all"), "slots of question of scorer 'cross-attention' is 'all'"),
        (_set(_question, "slots", [[0.0] * 2] * 2**11), "slots of question .* entries"),
        (lambda values: _question(values).pop("heads"), "question of scorer 'cross-attention' lacks heads"),
        (_set(_question, "components", {}), "components of question of scorer 'cross-attention' lacks basis, offset"),
        (_set(_question, "more", 1), "question of scorer 'cross-attention' has no argument 'more'"),
        (_set(lambda values: values["scorer_args"], "question", 3), "question of scorer 'cross-attention' is 3"),
    ],
)
def test_damaged_weights_by_question_are_refused_by_what_is_wrong(
    change: Callable[[dict[str, Any]], None], says: str
) -> None:
    values = WEIGHED.to_dict()
    change(values)
    with pytest.raises(PolicyError, match=says):
        PruningPolicy.from_dict(values)
