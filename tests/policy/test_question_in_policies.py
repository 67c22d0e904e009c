"""Policies that know the question, as files hold them: read back as they were, or refused by what is wrong."""

import base64
import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from catp_lightning import PolicyError, PruningPolicy, prune
from catp_lightning.methods.components import Question
from catp_lightning.methods.scorers import Learned
from tests.support.families import BY_NAME
from tests.support.questions import components, learned, network, routed
from tests.support.rules import OUTPUTS

ROUTED = PruningPolicy(keep=3, **routed(*OUTPUTS))
LEARNED = PruningPolicy(keep=3, **learned(slots=8))
BOTH = PruningPolicy(keep=3, **routed({**learned(slots=8), "selector": "dpp"}, OUTPUTS[0]))


@pytest.mark.parametrize("policy", [ROUTED, LEARNED, BOTH], ids=["routes", "network", "both"])
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


def test_a_policy_of_a_scorer_with_a_network_builds_it_again(tmp_path: Path) -> None:
    scorer = Learned(network(slots=8))
    policy = PruningPolicy.of(scorer, keep=3)
    assert policy.build_scorer() == scorer
    assert PruningPolicy.load(policy.save(tmp_path / "policy.json")).build_scorer() == scorer
    assert PruningPolicy.of(Learned()).scorer_args == {}


def test_components_are_encoded_to_the_last_bit_of_float32() -> None:
    rows = np.random.default_rng(0).standard_normal((3, 7)).astype(np.float32)
    question = Question.of(rows, np.array([0.0, 1.0, -2.5]))
    assert np.array_equal(question.rows(), rows) and question.count == 3 and question.offset == (0.0, 1.0, -2.5)


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


def _network(values: dict[str, Any]) -> Any:
    return values["stages"][0]["scorer_args"]["network"]


def _weights(**changes: Tensor | None) -> str:
    """A random network's weights with some changed, or left out."""
    found = {name: value.clone() for name, value in network(slots=8)._decoded.items()} | changes
    return base64.b64encode(save({name: value for name, value in found.items() if value is not None})).decode()


PICKLE = base64.b64encode(pickle.dumps({"out": 1})).decode()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set(_network, "weights", "%"), "weights are not base64 of safetensors"),
        (_set(_network, "weights", ""), "weights are not base64 of safetensors"),
        (_set(_network, "weights", PICKLE), "weights are not base64 of safetensors"),
        (_set(_network, "weights", _weights()[:400]), "weights are not base64 of safetensors"),
        (_set(_network, "weights", _weights(more=torch.zeros(1))), "weights are .*more.*; a network has bias"),
        (_set(_network, "weights", _weights(out=None)), "weights are .*; a network has .*out"),
        (_set(_network, "weights", _weights(place=torch.zeros(8))), "weights are"),
        (_set(_network, "weights", _weights(out=torch.zeros(7))), r"out of the weights is .* of shape \[7\]; .*\[8\]"),
        (_set(_network, "weights", _weights(out=torch.full((8,), torch.nan))), "out of the weights is .*finite"),
        (_set(_network, "weights", _weights(bias=torch.zeros(8).half())), "bias of the weights is .*float16"),
        (_set(_network, "features", asdict(components(2))), "2 components of a token"),
        (_set(_network, "question", asdict(components(5))), "5 of a question"),
        (_set(_network, "weights", 3), "weights of network of scorer 'learned' is 3"),
        (_set(_network, "question", {}), "question of network of scorer 'learned' lacks basis, offset"),
        (_set(_network, "more", 1), "network of scorer 'learned' has no argument 'more'"),
        (lambda values: _network(values).pop("question"), "network of scorer 'learned' lacks question"),
        (_set(lambda values: values["stages"][0]["scorer_args"], "network", 3), "network of scorer 'learned' is 3"),
    ],
)
def test_a_damaged_network_is_refused_by_what_is_wrong(change: Callable[[dict[str, Any]], None], says: str) -> None:
    values = LEARNED.to_dict()
    change(values)
    with pytest.raises(PolicyError, match=says) as refused:
        PruningPolicy.from_dict(values)
    assert len(str(refused.value)) < 1000
