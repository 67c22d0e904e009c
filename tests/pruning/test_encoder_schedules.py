"""Schedules on T5: tokens leave before the encoder and inside it by the method of each stage, merged or not."""

from dataclasses import replace

import pytest
import torch

from catp_lightning import PruningError, PruningPolicy, Stage, prune
from catp_lightning.methods.schedule import visits
from catp_lightning.methods.selectors import SELECTORS
from catp_lightning.pruning.pruner import applied
from tests.support.encoder_stages import MODELS, every_model, masked, stages_of
from tests.support.matrix import exact, generate, scale
from tests.support.merging import Scripted
from tests.support.rows import Row

pytestmark = pytest.mark.usefixtures("no_grad")
LATER = [Stage("fastv", {"layer": 1}, keep=0.5), Stage("visual-exit", {"layer": 2})]
POLICY = PruningPolicy("l2-norm", keep=0.75, then=LATER)


@every_model
def test_a_schedule_keeps_what_its_methods_choose_and_equals_hiding_it(row: Row) -> None:
    model, inputs, chosen = row.model(), row.inputs(), []
    forward = row.oracle.forward_inputs(inputs)
    with applied(model, POLICY) as pruner:
        decide = pruner.site.decide
        pruner.site.decide = lambda prompt: chosen.append(decide(prompt)) or chosen[-1]  # type: ignore[func-returns-value]
        prefill = model(**forward).logits
        tokens, steps = generate(row, model, inputs, 10)
        last = pruner.record.last
    first, second, none = (selection.keep for selection in chosen[:3])
    assert not none.any() and bool((second <= first).all()) and bool((second.sum(1) < first.sum(1)).all())
    with prune(model, PruningPolicy("l2-norm", keep=0.75)) as entry:
        model(**forward)
    assert entry.keep is not None and torch.equal(entry.keep, first), "the first stage is what its method alone chooses"
    with masked(model, inputs, (0, 1, 2), [first, second, none]):
        oracle = model(**forward).logits
        oracle_tokens, oracle_steps = generate(row, model, inputs, 10)
    exact(prefill, oracle, atol=row.tolerance() * scale(oracle))
    exact(steps, oracle_steps, atol=row.tolerance() * scale(oracle_steps))
    assert torch.equal(tokens, oracle_tokens)
    assert last is not None
    for counts, own_layers in zip(last.counts.tolist(), last.per_layer.tolist(), strict=True):
        assert tuple(own_layers) == visits(POLICY.steps(), counts, 3)


def test_tokens_are_merged_before_the_encoder_only_as_the_first_stage_of_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SELECTORS._own, "scripted", Scripted)
    model, inputs, chosen = MODELS[0].model(), MODELS[0].inputs(), []
    alone = PruningPolicy("l2-norm", selector="scripted", keep=0.5)
    with pytest.raises(PruningError, match="merges tokens, which is exact where a decoder"), prune(model, alone):
        pass
    with applied(model, replace(alone, then=LATER)) as pruner:
        decide = pruner.site.decide
        pruner.site.decide = lambda prompt: chosen.append(decide(prompt)) or chosen[-1]  # type: ignore[func-returns-value]
        merged = model(**MODELS[0].oracle.forward_inputs(inputs)).logits
    assert chosen[0].destination is not None and chosen[1].destination is None
    with stages_of(model, (0, 1, 2), lambda prompt: chosen[prompt.stage].keep).installed():
        dropped = model(**MODELS[0].oracle.forward_inputs(inputs)).logits
    assert scale(merged - dropped) > 1e-3 * scale(dropped), "what is carried is read"
