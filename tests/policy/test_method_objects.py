"""A method is an object: a policy is made of one, and gives the same one back, from a file too."""

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from catp_lightning import PolicyError, PruningPolicy, prune
from catp_lightning.methods import SCORERS, SELECTORS, Method, Scorer, Selection, Selector
from catp_lightning.methods.registry import Registry
from catp_lightning.methods.scorers import CATP, FastV, L2Norm, PyramidDrop, Stride, TrimmedLlama
from catp_lightning.methods.selectors import DPP, TopK, Union
from tests.support.models import random_blip2

ARGUMENTS: dict[str, Any] = {
    "layers": (0, 1),
    "head_weights": ((1.0, 0.5), (0.0, -2.0)),
    "slot_weights": (0.5, 1.0),
    "layer": 3,
    "seed": 7,
    "relevance": 0.25,
    "per": "sample",
    "pivots": 2,
    "context": 0.5,
    "important": 0.25,
    "budget": "rows",
}
"""Values other than the defaults, by the name of a field."""


def objects() -> Iterator[tuple[str, Any]]:
    """Every scorer and selector of this package as it is made without arguments, and with some that differ."""
    for registry in (SCORERS, SELECTORS):
        for name, cls in registry.items():
            yield f"{registry.kind} {name}", cls()
            other = {part.name: ARGUMENTS[part.name] for part in fields(cls) if part.name in ARGUMENTS}
            try:
                yield f"{registry.kind} {name} {other}", cls(**other)
            except ValueError:  # these arguments do not go together
                continue


@pytest.mark.parametrize(("name", "part"), list(objects()), ids=lambda value: value if isinstance(value, str) else "")
def test_a_policy_of_an_object_builds_an_equal_one_after_saving_too(tmp_path: Path, name: str, part: Any) -> None:
    scorer, selector = (part, None) if name.startswith("scorer") else (Stride(), part)
    policy = PruningPolicy.of(scorer, selector, keep=0.25)
    assert policy.keep == 0.25 and policy.build_scorer() == scorer
    assert policy.build_selector() == (SELECTORS[type(scorer).selector]() if selector is None else selector)
    assert PruningPolicy.load(policy.save(tmp_path / "policy.json")) == policy


def test_a_policy_of_objects_is_the_policy_of_their_names() -> None:
    assert PruningPolicy.of(FastV(layer=3), keep=0.25) == PruningPolicy("fastv", {"layer": 3}, keep=0.25)
    assert PruningPolicy.of(CATP(), DPP(relevance=0.5)) == PruningPolicy("catp", {}, "dpp", {"relevance": 0.5})
    assert json.loads(json.dumps(PruningPolicy.of(PyramidDrop()).to_dict()))["stages"][0]["scorer"] == "pyramiddrop"


def test_a_method_says_what_it_reads_and_whether_one_ranking_serves_all_budgets() -> None:
    method = PruningPolicy("trimmed-llama").method()
    assert method == Method(TrimmedLlama(), Union()) and method.needs.keys() == method.scorer.needs.keys()
    assert Method(Stride(), TopK()).nested and not Method(Stride(), TopK(per="sample")).nested


def test_a_method_selects_what_pruning_keeps() -> None:
    model, inputs = random_blip2()
    with torch.no_grad(), prune(model, PruningPolicy.of(L2Norm(), keep=3)) as pruning:
        model(**inputs)
    assert pruning.keep is not None and pruning.keep.sum(1).tolist() == [3, 3, 3]


class Unknown(Stride):
    """A scorer that no registry has."""


def test_a_class_without_a_name_is_refused_with_what_to_do() -> None:
    with pytest.raises(PolicyError, match=r"Unknown is not registered.*the group catp_lightning\.scorers"):
        PruningPolicy.of(Unknown())
    with pytest.raises(PolicyError, match="is not a selector that a policy can name"):
        PruningPolicy.of(Stride(), Stride())  # type: ignore[arg-type]


CODE = """
import torch
from dataclasses import dataclass
from catp_lightning.methods import Selection, Selector
from catp_lightning.methods.scorers import Stride

@dataclass(frozen=True)
class Last(Selector):
    'Keeps the last tokens.'
    def ranks(self, scores, visual, most, vectors):
        return (visual.flip(1).cumsum(1).flip(1) - 1).where(visual, most)

class NoSelector(Stride):
    pass
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[Selector]:
    """A registry of selectors beside which another package brings two, one of them wrong."""
    folder = tmp_path / "catp_last-1.2.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: catp-last\nVersion: 1.2\n")
    lines = ["[catp_lightning.selectors]", "last = catp_last:Last", "wrong = catp_last:NoSelector"]
    (folder / "entry_points.txt").write_text("\n".join(lines))
    (tmp_path / "catp_last.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "catp_last", raising=False)
    registry: Registry[Selector] = Registry("selector", Selector, {"top-k": TopK})
    for module in ("policy", "building"):
        monkeypatch.setattr(f"catp_lightning.policy.{module}.SELECTORS", registry)
    return registry


def test_a_selector_of_another_package_is_used_by_its_name_and_by_its_object(outside: Registry[Selector]) -> None:
    model, inputs = random_blip2()
    found = outside["last"]()
    policy = PruningPolicy.of(L2Norm(), found, keep=3)
    assert policy == PruningPolicy("l2-norm", selector="last", keep=3) and policy.build_selector() == found
    with torch.no_grad(), prune(model, policy) as pruning:
        model(**inputs)
    assert pruning.keep is not None and pruning.keep.tolist() == [[False] * 5 + [True] * 3] * 3


def test_an_object_of_another_package_has_its_name_although_it_was_imported_by_hand(
    outside: Registry[Selector],
) -> None:
    last = importlib.import_module("catp_last").Last()
    assert PruningPolicy.of(L2Norm(), last, keep=3).selector == "last"


def test_a_wrong_selector_of_another_package_is_refused_with_its_name(outside: Registry[Selector]) -> None:
    says = r"selector 'wrong' of the package catp-last 1\.2 .* is not a class under catp_lightning\.methods\.Selector"
    with pytest.raises(PolicyError, match=says):
        PruningPolicy("stride", selector="wrong")
    assert list(outside) == ["top-k", "last", "wrong"]


def test_scorers_and_selectors_are_abstract_where_they_must_be() -> None:
    scores, visual = torch.tensor([[1.0, 3.0, 2.0]]), torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match="Selector has no `ranks`"):
        Selector().select(scores, visual, torch.tensor([1]), None)
    with pytest.raises(TypeError, match="abstract"):
        Scorer()  # type: ignore[abstract]
    found: Selection = TopK().select(scores, visual, torch.tensor([2]), None)
    keep: Tensor = found.keep
    assert keep.tolist() == [[False, True, True]] and found.destination is None
