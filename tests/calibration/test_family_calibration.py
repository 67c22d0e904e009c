"""Calibration of every family and of every method: what it measures is what pruning by the saved policy does."""

import math
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from catp_lightning import CrossAttentionCalibration, PolicyError, PruningError, PruningPolicy
from catp_lightning.calibration.fit.fitting import Fitted, ScorerFit
from catp_lightning.calibration.fit.heads import HeadFit
from catp_lightning.calibration.fit.layers import LayerChoice
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.search.candidates import default_candidates, fitted_candidates
from catp_lightning.methods.observation import Observation
from catp_lightning.methods.scorers import SCORERS
from catp_lightning.models import find_family
from tests.support.calibrations import figures
from tests.support.clips import pair
from tests.support.families import ROWS
from tests.support.family_calibrations import KEEP, QUICK, SETTINGS, agreement, data
from tests.support.footprints import footprint
from tests.support.hybrid_families import HYBRID
from tests.support.modules import Generating
from tests.support.rows import Row
from tests.support.rules import early
from tests.support.trainers import loading, trainer

BY_NAME = {row.name: row for row in (*ROWS, *HYBRID)}
METHODS = {
    "Llava": (
        *("fastervlm", "vtc-cls", "vispruner", "visionzip", "cdpruner", "divprune", "downsample", "l2-norm"),
        *("fastv", "pyramiddrop", "sparsevlm", "dart", "visual-exit"),
    ),
    "LlavaNext": ("fastervlm", "divprune"),
    "Blip2-OPT": ("catp", "self-attention", "fastv"),
    "InstructBlip": ("catp", "cross-attention"),
    "Mllama": ("trimmed-llama", "l2-norm"),
    "Qwen2-VL": ("cdpruner",),
    "Qwen2.5-VL": ("divprune", "fastervlm", "visionzip", "fastv"),
    "Qwen3-VL": ("cdpruner", "vtc-cls"),
    "Qwen3.5": ("divprune", "fastervlm"),
    "LFM2-VL": ("divprune",),
    "Gemma3": ("divprune", "fastv"),
    "PaliGemma2": ("divprune",),
    "Mistral3, sliding window": ("divprune", "pyramiddrop"),
    "Pixtral": ("divprune",),
    "InternVL": ("divprune",),
    "SmolVLM": ("divprune",),
    "Idefics3": ("divprune",),
    "Blip2-T5": ("catp", "fastv"),
    "InstructBlip-T5": ("catp",),
}
FAST = {
    "Llava": ("fastervlm", "fastv", "visual-exit"),
    "Mllama": ("trimmed-llama",),
    "Blip2-T5": ("catp",),
}
"""Those of `METHODS` that are no slow test: each kind of replay, before the decoder and inside."""


def calibrate(row: Row, path: Path, **options: Any) -> PruningPolicy:
    callback = CrossAttentionCalibration(path, keep=KEEP, settings=QUICK, **options)
    trainer(callback).predict(Generating(row.model(), SETTINGS), loading(data(row)))
    assert PruningPolicy.load(path) == callback.policies[0]
    return callback.policies[0]


def check(row: Row, policy: PruningPolicy) -> None:
    """The policy is what was checked."""
    checked = figures(policy, policy.evidence["chosen"])["check"]["agreement"]
    assert checked == pytest.approx(agreement(row, policy)[1], abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_what_is_measured_of_every_rule_is_what_pruning_does(name: str, tmp_path: Path) -> None:
    row, shares = BY_NAME[name], set()
    policy = calibrate(row, tmp_path / "policy.json")
    candidates = default_candidates(Plan.of(find_family(row.model())))
    names = {candidate.name for candidate in candidates}
    assert {"random", "stride", "l2-norm", "diversity of outputs"} <= names, "controls always compete"
    controls = [candidate for candidate in candidates if candidate.reference][:6]
    others = [candidate for candidate in candidates if candidate.scorer in METHODS[name]][:6]
    for candidate in [*controls, *others]:
        measured = figures(policy, candidate.name)
        learned, checked = agreement(row, candidate.policy(KEEP))
        if measured["choose"]["samples"] == policy.evidence["samples"]["learn"]:  # it stayed to the end
            assert measured["choose"]["agreement"] == pytest.approx(learned, abs=1e-12), candidate.name
        if measured["check"] is not None:
            assert measured["check"]["agreement"] == pytest.approx(checked, abs=1e-12), candidate.name
        shares.add(measured["choose"]["agreement"])
    assert len(shares) > 1, "candidates must differ, or this proves nothing"
    assert policy.model == find_family(row.model()).describe()
    check(row, policy)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=[] if method in FAST.get(name, ()) else pytest.mark.slow)
        for name in METHODS
        for method in METHODS[name]
    ],
)
def test_one_method_is_calibrated_by_its_name_and_where_it_drops(name: str, method: str, tmp_path: Path) -> None:
    row, selector = BY_NAME[name], "top-k" if method == "trimmed-llama" else None
    where = {} if method == "visual-exit" else early(method)  # there the budget says where
    policy = calibrate(row, tmp_path / "policy.json", scorer=method, scorer_args=where, selector=selector)
    controls = {control for control, cls in SCORERS.items() if cls.control}
    assert policy.scorer == method, "controls compete, but are not what was asked for"
    assert {row["name"].split()[0] for row in policy.evidence["candidates"]} <= {method, *controls}
    check(row, policy)
    if method == "visual-exit":
        depth = find_family(row.model()).depth
        assert policy.scorer_args == {"layer": math.ceil(KEEP * depth)}, "a budget is the share of layers that read"


@pytest.mark.parametrize(
    ("name", "method", "args"),
    [("Llava", None, {}), ("Mllama", None, {}), ("Llava", "fastervlm", {}), ("Llava", "fastv", {"layer": 2})],
)
def test_fitted_weights_weigh_the_head_scores_that_were_fitted(
    name: str, method: str | None, args: dict[str, Any]
) -> None:
    family = find_family(BY_NAME[name].model())
    plan = Plan.of(family, None if method is None else PruningPolicy(method, args))
    ((name, scorer),) = plan.scorers.items()
    layers, heads = (plan.layers_read(name)[-1],), plan.heads(name)
    weights = np.linspace(-1, 2, heads)
    fit = HeadFit(weights, np.zeros(0), 0.1, 0.0, 0.5, np.ones(heads))
    found = ScorerFit(LayerChoice(layers, (), (1.0,)), layers, fit, True)
    candidates = fitted_candidates(plan, Fitted([], None, {name: found}))
    policy = next(candidate for candidate in candidates if candidate.name == f"{name} heads").policy(KEEP)
    signal = next(iter(scorer.needs))
    paid = torch.rand(3, heads, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    valid = torch.arange(6) < torch.tensor([6, 4, 6])[:, None]
    count = plan.layer or family.layers()[signal]
    seen = Observation(valid, {signal: count}, {(signal, layer): paid for layer in range(count)})
    head_scores = scorer.head_scores(seen)[:, -1]
    expected = (head_scores * torch.tensor(fit.weights)[:, None]).sum(1)
    torch.testing.assert_close(policy.build_scorer().score(seen)[valid], expected[valid], rtol=0, atol=1e-3)
    assert not torch.allclose(head_scores, paid, atol=0.1), "on the scale of the fit"


@pytest.mark.slow
def test_a_guide_is_asked_while_its_layers_and_heads_are_calibrated(tmp_path: Path) -> None:
    row = BY_NAME["Llava"]
    guide = deepcopy(row.model())
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for weight in guide.parameters():
            weight.add_(0.3 * weight.std(correction=0) * torch.randn_like(weight))
    guide.generate(**row.inputs(), **SETTINGS)  # transformers sets hooks of its own, which stay
    before = footprint(guide)
    policy = calibrate(row, tmp_path / "policy.json", scorer="sgl", guide=guide)
    names = [row["name"] for row in policy.evidence["candidates"]]
    assert policy.scorer == "sgl" and {"sgl", "sgl layer 0", "sgl layer 1"} <= set(names)
    for name in (policy.evidence["chosen"], "sgl layer 1"):
        args = {"layers": [1]} if name == "sgl layer 1" else policy.scorer_args
        checked = figures(policy, name)["check"]["agreement"]
        assert checked == pytest.approx(agreement(row, PruningPolicy("sgl", args, keep=KEEP), guide)[1], abs=1e-12)
    assert footprint(guide) == before


@dataclass(frozen=True, eq=False)
class WithClip(Row):
    """Row with a model of its own: a copy of another row's, with the vision tower of a CLIP."""

    own: Any = None

    def model(self, dtype: torch.dtype = torch.float64, attention: str | None = None) -> PreTrainedModel:
        return self.own


@pytest.mark.slow
def test_a_text_encoder_is_asked_while_the_method_that_reads_it_is_measured(tmp_path: Path) -> None:
    llava, clip = BY_NAME["Llava"], pair("Llava", tmp_path)
    row = WithClip("Llava with a CLIP", llava.make, llava.samples, llava.oracle, own=clip.model)
    policy = calibrate(row, tmp_path / "policy.json", scorer="cdpruner", scorer_args=clip.args)
    assert (policy.scorer, policy.scorer_args) == ("cdpruner", clip.args)
    assert [row["name"] for row in policy.evidence["candidates"] if "cdpruner" in row["name"]] == ["cdpruner"]
    checked = figures(policy, "cdpruner")["check"]["agreement"]
    really, words = (agreement(row, one)[1] for one in (policy, PruningPolicy("cdpruner", keep=KEEP)))
    assert checked == pytest.approx(really, abs=1e-12) and abs(really - words) > 0.01


def test_a_method_that_needs_what_calibration_cannot_give_is_refused(tmp_path: Path) -> None:
    module = Generating(BY_NAME["Llava"].model(), SETTINGS)
    for options, why in (({"scorer": "sgl"}, "guide"), ({"scorer": "catp"}, "cross-attention")):
        callback = CrossAttentionCalibration(tmp_path / "p.json", **options)  # type: ignore[arg-type]
        with pytest.raises(PruningError, match=f"cannot be calibrated here.*{why}"):
            L.Trainer(callbacks=[callback], accelerator="cpu", logger=False, enable_progress_bar=False).predict(
                module,
                loading(data(BY_NAME["Llava"])[:1]),
            )
    with pytest.raises(PolicyError, match="name it"):
        CrossAttentionCalibration(scorer_args={"layer": 2})
