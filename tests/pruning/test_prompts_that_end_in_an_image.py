"""Prompts whose last row is a visual token: it stays, whatever the budget, for the answer is predicted from it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from catp_lightning import PruningPolicy, prune
from catp_lightning.calibration.fit.probing import Probing
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.recorder import Recorder
from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.methods.observation import Signal
from catp_lightning.models import find_family
from tests.support.families import BY_NAME
from tests.support.matrix import exact, generate
from tests.support.oracles import IMAGE, Inputs
from tests.support.rows import Row

pytestmark = pytest.mark.usefixtures("no_grad")
RULES = {
    "before the decoder": PruningPolicy("position", keep=2),
    "of the sample": PruningPolicy("position", keep=2, selector_args={"per": "sample"}),
    "merging": PruningPolicy("visionzip", keep=3),
    "inside the decoder": PruningPolicy("fastv", {"layer": 1}, keep=2),
    "merging inside": PruningPolicy("sparsevlm", {"stages_at": [1]}, keep=2),
    "all leave": PruningPolicy("visual-exit", {"layer": 1}),
}


def ending_in_an_image(row: Row) -> tuple[Inputs, Inputs]:
    """A sample that ends in its image, and a batch of it and one that goes on."""
    whole = row.inputs([0])
    end = int((whole["input_ids"] == IMAGE).nonzero()[-1, 1]) + 1
    pads = whole["input_ids"].shape[1] - end
    padded = {
        name: torch.cat([torch.zeros_like(value[:, :pads]), value[:, :end]], 1) if value.dim() == 2 else value
        for name, value in whole.items()
        if name in ("input_ids", "attention_mask")
    }
    others = {name: torch.cat([value, value]) for name, value in whole.items() if name not in padded}
    alone = {**whole, **{name: value[:, :end] for name, value in whole.items() if name in padded}}
    return alone, {**others, **{name: torch.cat([padded[name], whole[name]]) for name in padded}}


@pytest.mark.parametrize("rule", RULES)
def test_the_last_row_stays_beyond_the_budget(rule: str) -> None:
    row, policy = BY_NAME["Llava"], RULES[rule]
    model, (alone, together) = row.model(), ending_in_an_image(row)
    with prune(model, policy) as pruning:
        tokens, steps = generate(row, model, alone, 2)
        kept = pruning.keep[0]
        both, both_steps = generate(row, model, together, 2)
        counts = pruning.keep.sum(1).tolist()
    budget = 0 if rule == "all leave" else policy.keep
    assert kept[-1] and int(kept.sum()) == budget + 1
    assert counts == [budget + 1, budget] and torch.equal(both[0], tokens[0])
    exact(both_steps[0], steps[0], atol=1e-10)


@pytest.mark.parametrize("name", ["Llava", "InternVL"])
def test_what_is_kept_is_what_a_masked_run_reads(name: str) -> None:
    row = BY_NAME[name]
    model, (_, together) = row.model(), ending_in_an_image(row)
    with prune(model, PruningPolicy("l2-norm", keep=2)) as pruning:
        tokens, steps = generate(row, model, together)
    with row.oracle.masked(model, together, pruning.keep):
        masked_tokens, masked_steps = generate(row, model, together)
    assert torch.equal(tokens, masked_tokens)
    exact(steps, masked_steps, atol=1e-10 * float(masked_steps.abs().max()))


def test_calibration_keeps_it_in_every_probe_and_answers_such_prompts_as_pruning_does() -> None:
    row = BY_NAME["Llava"]
    model, (_, together) = row.model(), ending_in_an_image(row)
    plan = Plan.of(find_family(model))
    recorder = Recorder(plan, {Signal.IMAGE_HASH: None, Signal.IMAGE_FEATURES: None, **plan.needs})
    with recorder.recording():
        answers = model.generate(**together, max_new_tokens=2, do_sample=False, suppress_tokens=[IMAGE])[:, -2:]
        with recorder.recorded() as [pair]:
            samples = Samples.of(*pair)
            probed: list[Any] = []
            noting = samples.replay.answer_log_probability
            probing = Probing(plan, [0.25], torch.zeros_like, None)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(samples.replay), "answer_log_probability", _noting(noting, probed))
                probing.see(samples)
    ends = samples.visual & (samples.visual.cumsum(1) == samples.visual.sum(1, keepdim=True))
    assert probed and all(keep[:, 0][:, ends[0]].all() for keep in probed)
    assert not all(keep[:, 1][:, ends[1]].all() for keep in probed), "elsewhere the last token may leave"
    with prune(model, PruningPolicy("l2-norm", keep=2)) as pruning:
        _, steps = generate(row, model, together, 2)
    found = samples.replay.log_probabilities(pruning.keep)
    assert torch.equal(found[:, 0].argmax(-1), steps[:, 0].argmax(-1)) and answers.shape == (2, 2)
    exact(found[:, 0], steps[:, 0].log_softmax(-1), atol=1e-8)


def _noting(call: Callable[..., Any], seen: list[Any]) -> Callable[..., Any]:
    def noted(replay: Any, keep: Any) -> Any:
        seen.append(keep)
        return call(keep)

    return noted
