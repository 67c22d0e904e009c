"""The two functions for servers keep what `prune` keeps, and refuse what they cannot carry."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from catp_lightning import PolicyError, PruningError, PruningPolicy, Stage, prune
from catp_lightning.methods import SCORERS, SELECTORS, Method, Observation, Selection, Selector, Signal
from catp_lightning.methods.observation import join
from catp_lightning.methods.scorers import L2Norm
from catp_lightning.models import find_family
from catp_lightning.serving import check_servable, kept_count, kept_tokens
from tests.support.families import BY_NAME
from tests.support.observing import Notes, observed
from tests.support.questions import counted, routed
from tests.support.quick import quick

FEATURES = {"divprune", "l2-norm", "position", "stride", "random"}
TOWER = {"fastervlm", "vtc-cls", "vispruner"}
QUERIES = {"catp", "cross-attention", "region-attention", "self-attention"}
SERVED = {
    "Llava": FEATURES | TOWER | {"grid"},
    "LlavaNext": FEATURES | TOWER | {"grid"},
    "Qwen2.5-VL": FEATURES | TOWER | {"grid"},
    "Qwen3-VL": FEATURES | TOWER | {"grid"},
    "Blip2-OPT": FEATURES | QUERIES,
}
REFUSED = {
    "fastv": "inside the decoder",
    "pyramiddrop": "inside the decoder",
    "sparsevlm": "inside the decoder",
    "dart": "inside the decoder",
    "visual-exit": "inside the decoder",
    "dyvte": "inside the decoder",
    "visionzip": "merges tokens",
    "downsample": "merges tokens",
    "quecc": "writes rows of its own",
    "flashsloth": "writes rows of its own",
    "cdpruner": "image-embeds, text-embeds",
    "learned": "question",
    "sgl": "guide-attention",
    "trimmed-llama": "cross-attention-to-image",
}


def policies(name: str) -> list[PruningPolicy]:
    """Policies of one scorer that differ in budget, unit and selector."""
    own: list[Mapping[str, Any]] = [{"keep": 0.5}, {"keep": 3}, {"keep": 0.34, "selector_args": {"per": "crop"}}]
    others = [{"selector": "facility-location"}, {"selector": "dpp", "selector_args": {"similarity": "outputs"}}]
    return [PruningPolicy(name, **args) for args in (own + others if name == "l2-norm" else own)]


def in_order(kept: Tensor, valid: Tensor) -> list[bool]:
    """Which visual tokens of a batch stay, in the order of their placeholders."""
    return kept[valid].tolist()


@pytest.mark.parametrize("row", quick(SERVED, {"Llava", "LlavaNext", "Blip2-OPT"}))
def test_the_functions_keep_what_prune_keeps_on_the_same_signals(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = BY_NAME[row].model(), BY_NAME[row].inputs()
    family = find_family(model)
    served = {
        name: policies(name)
        for name in SCORERS
        if name not in REFUSED and family.shows(PruningPolicy(name).method().needs)
    }
    assert served.keys() == SERVED[row]
    wanted = join(policy.method().needs for own in served.values() for policy in own)
    with monkeypatch.context() as patched:
        patched.setattr(PruningPolicy, "method", lambda policy: Method(Notes(), SELECTORS["top-k"]()))
        (seen,) = observed(wanted, model, inputs)
    dropped = 0
    for policy in (policy for own in served.values() for policy in own):
        with prune(model, policy) as pruning:
            model(**inputs)
        assert pruning.keep is not None and pruning.last is not None
        there = torch.arange(pruning.keep.shape[1]) < pruning.last.counts[:, None]
        kept = kept_tokens(policy, seen)
        assert in_order(kept, seen.valid) == in_order(pruning.keep, there), policy
        dropped += int((seen.valid & ~kept).sum())
        for image in range(seen.images):  # the number was known before
            free = seen.droppable[image]
            sizes = [int(free.sum())] if seen.crops is None else seen.crops[image][free].bincount().tolist()
            always = int((seen.valid[image] & ~free).sum())
            assert int(kept[image].sum()) == kept_count(policy, sizes, always), policy
    assert dropped


@pytest.mark.parametrize("row", ["Llava", "Qwen2.5-VL", "Qwen3-VL"])
def test_features_as_transformers_gives_them_are_enough_for_rules_that_compare_tokens(row: str) -> None:
    model, inputs = BY_NAME[row].model(), BY_NAME[row].inputs(rows=[0, 1])
    grids = {name: inputs[name] for name in ("image_grid_thw",) if name in inputs}
    found = model.get_image_features(pixel_values=inputs["pixel_values"], **grids).pooler_output
    for policy in [*policies("l2-norm")[:2], PruningPolicy("divprune", keep=0.4)]:
        with prune(model, policy) as pruning:
            model(**inputs)
        assert pruning.keep is not None and pruning.last is not None
        there = torch.arange(pruning.keep.shape[1]) < pruning.last.counts[:, None]
        own = []
        for features in found:  # one image after the other, as a server has them
            seen = Observation.of_equal(1, len(features), {}, {Signal.IMAGE_FEATURES: features[None]})
            own += kept_tokens(policy, seen)[0].tolist()
        assert own == in_order(pruning.keep, there)
        assert not all(own)


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_is_served_or_refused_with_the_reason(name: str) -> None:
    if name in REFUSED:
        with pytest.raises(PolicyError, match=REFUSED[name]):
            check_servable(PruningPolicy(name))
        with pytest.raises(PolicyError, match=REFUSED[name]):
            kept_count(PruningPolicy(name), 100)
    else:
        assert any(name in names for names in SERVED.values())
        assert kept_count(PruningPolicy(name, keep=0.25), 99) == 25


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        (PruningPolicy("fastervlm", keep=0.5, then=[Stage("fastv", {"layer": 8}, keep=0.1)]), "'fastv' lets tokens"),
        (PruningPolicy("fastervlm", keep=0.5, then=[Stage("fastervlm", keep=0.1)]), "has 2 stages"),
        (PruningPolicy("divprune", selector_args={"per": "sample"}), "of all images of a prompt"),
        (PruningPolicy("fastervlm", selector="vscan"), "'vscan' merges tokens"),
        (PruningPolicy("l2-norm", selector="union"), "cross-attention-to-image"),
        (PruningPolicy(**routed({"scorer": "l2-norm"}, {"scorer": "stride"})), "chooses the rule"),
        (PruningPolicy(**counted({"scorer": "l2-norm"})), "says how many tokens stay"),
    ],
)
def test_what_an_image_alone_cannot_decide_is_refused(policy: PruningPolicy, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        check_servable(policy)


def test_protected_tokens_stay_beside_the_budget() -> None:
    features = torch.arange(12.0).reshape(1, 6, 2)
    seen = Observation.of_equal(1, 6, {}, {Signal.IMAGE_FEATURES: features})
    seen.protected = torch.tensor([[True, False, False, False, False, True]])
    kept = kept_tokens(PruningPolicy("l2-norm", keep=0.5), seen)
    assert kept.tolist() == [[True, False, False, True, True, True]]
    assert int(kept.sum()) == kept_count(PruningPolicy("l2-norm", keep=0.5), 4, protected=2)


def test_a_budget_of_each_crop_is_counted_by_crop() -> None:
    policy = PruningPolicy("l2-norm", keep=0.5, selector_args={"per": "crop"})
    assert kept_count(policy, [5, 5, 3]) == 3 + 3 + 2
    assert kept_count(PruningPolicy("l2-norm", keep=0.5), [5, 5, 3]) == 7


@dataclass(frozen=True)
class OneMore(Selector):
    """Keeps one token more than it is asked for."""

    nested: ClassVar[bool] = False

    def select(self, scores: Tensor, visual: Tensor, counts: Tensor, vectors: Tensor | None) -> Selection:
        return Selection(torch.arange(visual.shape[1]) < counts[:, None] + 1)


def test_a_selector_that_keeps_another_number_than_announced_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PruningPolicy, "method", lambda policy: Method(L2Norm(), OneMore()))
    seen = Observation.of_equal(1, 6, {}, {Signal.IMAGE_FEATURES: torch.rand(1, 6, 2)})
    with pytest.raises(PruningError, match="keeps 4 tokens of image 0, where 3 were announced"):
        kept_tokens(PruningPolicy("l2-norm", keep=3), seen)


def test_serving_is_imported_without_lightning_or_transformers() -> None:
    code = "import catp_lightning.serving, sys; print(sorted({n.partition('.')[0] for n in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'torch'" in loaded
    for name in ("lightning", "pytorch_lightning", "transformers", "torchmetrics", "wandb"):
        assert f"'{name}'" not in loaded
