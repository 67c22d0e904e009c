"""Schedules prune by the method of each stage, exactly, and say how many tokens each layer read."""

from typing import Any

import pytest
import torch
from torch import Tensor

from catp_lightning import PolicyError, PruningError, PruningPolicy, Stage, prune
from catp_lightning.methods.schedule import visits
from catp_lightning.pruning.pruner import applied
from tests.support.matrix import exact, generate, scale
from tests.support.stages import LAYERS, LLAMA, OPT, QWEN, Uneven, masked, model_of, stages_of

pytestmark = pytest.mark.usefixtures("no_grad")
THREE = PruningPolicy(
    "l2-norm", keep=0.75, then=[Stage("fastv", {"layer": 1}, keep=0.5), Stage("visual-exit", {"layer": 3})]
)
every_model = pytest.mark.parametrize("row", [LLAMA, OPT, QWEN], ids=repr)


@pytest.mark.slow
@every_model
def test_a_schedule_keeps_what_its_methods_choose_and_equals_hiding_it(row: Any) -> None:
    model, inputs, keeps = model_of(row), row.inputs(), []
    with applied(model, THREE) as pruner:
        site, own = pruner.site, pruner.site.decide
        site.decide = lambda prompt: keeps.append(own(prompt).keep) or pruner._decide(prompt)  # type: ignore[func-returns-value]
        prefill = model(**inputs).logits
        tokens, steps = generate(row, model, inputs, 10)
        last = pruner.record.last
    first, second, none = keeps[:3]
    assert not none.any() and bool((second <= first).all()) and bool((second.sum(1) < first.sum(1)).all())
    with prune(model, PruningPolicy("l2-norm", keep=0.75)) as entry:
        model(**inputs)
    assert entry.keep is not None and torch.equal(entry.keep, first), "the first stage is what its method alone chooses"
    with masked(row, model, inputs, (0, 1, 3), keeps[:3]):
        oracle = model(**inputs).logits
        oracle_tokens, oracle_steps = generate(row, model, inputs, 10)
    rows, atol = row.oracle.compared(inputs, none), row.tolerance() * scale(oracle)
    exact(prefill[rows], oracle[rows], atol=atol)
    exact(steps, oracle_steps, atol=atol)
    assert torch.equal(tokens, oracle_tokens)
    assert last is not None and last.per_layer.shape == (len(first), LAYERS)
    assert torch.equal(last.per_layer[:, 1], second.sum(1)) and not last.per_layer[:, 3].any()


def test_a_later_stage_sees_attention_from_rows_that_the_first_left() -> None:
    model, inputs, seen = model_of(LLAMA), LLAMA.inputs(), []
    choose = Uneven()

    def look(prompt: Any) -> Tensor:
        if prompt.stage:
            seen.append(prompt.attention)
        return choose(prompt)

    with stages_of(model, (0, 2), look, observe=True).installed():
        model(**inputs)
    (attention,), (first, _) = seen, choose.keeps
    assert not attention.transpose(1, 2)[~first].any() and bool(attention.transpose(1, 2)[first].all())


@every_model
def test_each_layer_reads_the_numbers_that_were_predicted(row: Any) -> None:
    model, inputs = model_of(row), row.inputs([1, 1])
    with prune(model, THREE) as pruning:
        model(**inputs)
    assert pruning.last is not None
    (tokens,) = set(pruning.last.counts.tolist())
    assert pruning.last.per_layer.tolist() == [list(visits(THREE.steps(), tokens, LAYERS))] * 2


def test_a_stage_of_share_one_is_left_out_and_schedules_of_nothing_prune_nothing() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    full = model(**inputs).logits
    with prune(model, PruningPolicy("l2-norm", keep=1.0, then=[Stage("fastv", {"layer": 2}, keep=1.0)])) as pruning:
        assert torch.equal(model(**inputs).logits, full)
    assert pruning.last is not None and torch.equal(pruning.last.per_layer[:, -1], pruning.last.counts)
    with applied(model, PruningPolicy("l2-norm", keep=1.0, then=[Stage("fastv", {"layer": 2}, keep=0.5)])) as pruner:
        assert pruner.leave_at == (2,)
        model(**inputs)


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([Stage("fastv", {"layer": 2}), Stage("l2-norm")], "'l2-norm' after it at layer 0"),
        ([Stage("l2-norm"), Stage("fastv", {"layer": 9})], r"layers \[0, 9\] of"),
        ([Stage("l2-norm"), Stage("fastv", {"layer": 2}, "dpp", {"per": "image"})], "a budget is of the whole sample"),
    ],
)
def test_stages_that_cannot_be_are_refused_before_the_model_is_touched(stages: list[Stage], says: str) -> None:
    first, *then = stages
    policy = PruningPolicy(first.scorer, first.scorer_args, keep=0.5, then=then)
    with pytest.raises((PolicyError, PruningError), match=says), prune(model_of(LLAMA), policy):
        pass
