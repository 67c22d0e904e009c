"""Dropping inside T5's encoder equals hiding the same tokens from the blocks after it, and from the decoder."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from catp_lightning import PruningError, PruningPolicy, prune
from catp_lightning.methods.observation import Needs, Signal
from catp_lightning.methods.selection import Selection
from catp_lightning.models import find_family
from catp_lightning.pruning.sites import PruneAtEncoderLayers, SiteSettings
from catp_lightning.pruning.sites.stage_prompt import StagePrompt
from tests.support.encoder_stages import MODELS, every_model, every_stage, masked, stages_of
from tests.support.families import T5_ATTENTION
from tests.support.footprints import footprint
from tests.support.matrix import SAMPLED_BEAMS, PlantedError, exact, fail, generate, scale, settled
from tests.support.oracles import Inputs, columns_kept, visual_columns
from tests.support.rows import Row
from tests.support.stages import LAST_ROW, MostAttended, Uneven, chosen

pytestmark = pytest.mark.usefixtures("no_grad")
SEEN: Needs = {Signal.LAST_TOKEN_ATTENTION: None, Signal.TEXT_TO_IMAGE_ATTENTION: None, Signal.HIDDEN_STATES: None}
STAGES, THREE = (1, 2), (0, 1, 2)


@every_model
@every_stage
@pytest.mark.parametrize(("dtype", "attention"), [(torch.float64, None), (torch.float32, "eager")], ids=str)
def test_dropping_equals_hiding_in_prefill_and_decoding(
    row: Row, stages: tuple[int, ...], dtype: torch.dtype, attention: str | None
) -> None:
    model, inputs = row.model(dtype, attention), row.inputs(dtype=dtype)
    forward, keeps, choose = row.oracle.forward_inputs(inputs), chosen(inputs, row, stages), Uneven()
    full = model(**forward).logits
    with stages_of(model, stages, choose).installed():
        prefill = model(**forward).logits
        tokens, steps = generate(row, model, inputs, 10)
        looped = torch.stack([*row.oracle.loop(model, inputs, tokens, with_positions=False)], 1)
    assert [keep.tolist() for keep in choose.keeps] == 3 * [keep.tolist() for keep in keeps], "once a stage and prompt"
    with masked(model, inputs, stages, keeps):
        oracle = model(**forward).logits
        oracle_tokens, oracle_steps = generate(row, model, inputs, 10)
    atol = row.tolerance(dtype, attention) * scale(full)
    assert scale(oracle - full) > 0.1 * scale(full), "dropping must move logits, or this proves nothing"
    exact(prefill, oracle, atol=atol)
    exact(steps, oracle_steps, atol=atol)
    exact(looped, steps, atol=atol)
    assert torch.equal(tokens, oracle_tokens)


@pytest.mark.slow
@every_model
@every_stage
def test_a_carried_mean_equals_the_mean_written_into_the_full_run(row: Row, stages: tuple[int, ...]) -> None:
    """The first token of each sample that stays carries all that leave at a stage."""
    model, inputs = row.model(), row.inputs()
    forward, keeps, visual = row.oracle.forward_inputs(inputs), chosen(inputs, row, stages), visual_columns(inputs)
    there = [row.oracle.tokens(inputs), *keeps]

    def carry(prompt: Any) -> Selection:
        keep = keeps[prompt.stage]
        first = keep.long().argmax(1, keepdim=True).expand_as(keep)
        own = torch.arange(keep.shape[1]).expand_as(keep)
        return Selection(keep, own.where(keep, first).where(there[prompt.stage], -1))

    def write(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stage = stages.index(list(model.language_model.encoder.block).index(block))
        changed, beams = args[0].clone(), len(args[0]) // len(visual)
        for place, sample in enumerate(changed):
            columns, keep = visual[place // beams].nonzero()[:, 0], keeps[stage][place // beams]
            carried = (there[stage][place // beams] & ~keep) | (keep.cumsum(0) * keep == 1)
            sample[columns[keep][0]] = args[0][place, columns[carried]].mean(0)
        return (changed, *args[1:]), kwargs

    with PruneAtEncoderLayers(find_family(model), carry, SiteSettings(stages)).installed():
        logits = model(**forward).logits
        _, steps = generate(row, model, inputs)
    with masked(model, inputs, stages, keeps), ExitStack() as undo:
        dropped = model(**forward).logits
        for at in stages:
            hook = model.language_model.encoder.block[at].register_forward_pre_hook(write, with_kwargs=True)
            undo.callback(hook.remove)
        oracle = model(**forward).logits
        _, expected = generate(row, model, inputs)
    assert scale(oracle - dropped) > 1e-3 * scale(dropped), "merging matters"
    exact(logits, oracle, atol=row.tolerance() * scale(oracle))
    exact(steps, expected, atol=row.tolerance() * scale(expected))


@every_model
@pytest.mark.parametrize(
    ("stages", "entered", "read"),  # stages before the states that enter each block, and before its attention
    [((1, 2), (0, 0, 1, 2), (0, 1, 2)), ((0, 1, 2), (1, 1, 2, 3), (1, 2, 3)), ((0, 2), (1, 1, 1, 2), (1, 1, 2))],
    ids=str,
)
def test_states_and_attention_of_the_encoder_come_back_at_full_length(
    row: Row, stages: tuple[int, ...], entered: tuple[int, ...], read: tuple[int, ...]
) -> None:
    model, inputs = row.model(torch.float32, "eager"), row.inputs(dtype=torch.float32)
    forward, keeps = row.oracle.forward_inputs(inputs), chosen(inputs, row, stages)
    asked = {"output_hidden_states": True, "output_attentions": True}
    with stages_of(model, stages, Uneven()).installed():
        found = model(**forward, **asked).language_model_outputs
    with masked(model, inputs, stages, keeps):
        expected = model(**forward, **asked).language_model_outputs
    real, all_rows = inputs["attention_mask"].bool(), torch.ones_like(inputs["attention_mask"], dtype=torch.bool)
    left = [all_rows, *(columns_kept(inputs, keep) for keep in keeps)]
    for name, of_layer in (("encoder_hidden_states", entered), ("encoder_attentions", read)):
        for own, other, stage in zip(found[name], expected[name], of_layer, strict=True):
            assert own.shape == other.shape
            ours, theirs = (x if x.dim() == 3 else x.transpose(1, 2) for x in (own, other))
            assert not ours[~left[stage]].any()
            exact(ours[left[stage] & real], theirs[left[stage] & real], atol=2e-5 * scale(theirs))
    ours, theirs = found.encoder_last_hidden_state, expected.encoder_last_hidden_state
    exact(ours[left[-1] & real].as_subclass(Tensor), theirs[left[-1] & real], atol=2e-5 * scale(theirs))
    for ours, theirs in zip(found.cross_attentions, expected.cross_attentions, strict=True):
        exact(ours, theirs, atol=2e-5)


@every_model
@pytest.mark.parametrize("stages", [STAGES, THREE], ids=str)
@pytest.mark.parametrize("attention", sorted({T5_ATTENTION, "eager"}))
def test_what_is_observed_is_what_an_eager_run_pays(row: Row, attention: str, stages: tuple[int, ...]) -> None:
    model, inputs = row.model(torch.float32, attention), row.inputs(dtype=torch.float32)
    forward, eager = row.oracle.forward_inputs(inputs), row.model(torch.float32, "eager")
    prompts, keeps = [], chosen(inputs, row, stages)

    def choose(prompt: Any) -> Tensor:
        if isinstance(prompt, StagePrompt):
            prompts.append(prompt)
        return keeps[prompt.stage]

    with stages_of(model, stages, choose, SEEN).installed():
        model(**forward)
    with masked(eager, inputs, stages, keeps):
        asked = {"output_hidden_states": True, "output_attentions": True}
        run = eager(**forward, **asked).language_model_outputs
    visual, real = visual_columns(inputs), inputs["attention_mask"].bool()
    assert len(prompts) == 2
    for prompt, block in zip(prompts, STAGES, strict=True):
        there = [row.oracle.tokens(inputs), *keeps][prompt.stage]
        for sample, columns in enumerate(visual):
            own = (real[sample] & ~columns).nonzero()[:, 0]
            own = own[own > columns.nonzero()[0, 0]]
            stay = there[sample, : columns.sum()]
            for layer in range(block):
                maps = run.encoder_attentions[layer][sample][:, :, columns] * (stay if layer else 1)
                text = prompt.values[Signal.TEXT_TO_IMAGE_ATTENTION, layer][sample]
                exact(text[:, : len(own), : len(stay)], maps[:, own], atol=1e-5)
                last = prompt.values[Signal.LAST_TOKEN_ATTENTION, layer][sample]
                exact(last[:, : len(stay)], maps[:, real[sample].nonzero()[-1, 0]], atol=1e-5)
            hidden = prompt.values[Signal.HIDDEN_STATES][sample][: len(stay)]
            states = run.encoder_hidden_states[block][sample][columns]
            exact(hidden[stay], states[stay], atol=2e-5 * scale(states))


@pytest.mark.slow
@every_model
@pytest.mark.parametrize("stages", [STAGES, THREE], ids=str)
def test_a_sample_does_not_depend_on_its_batch_or_padding_and_beams_choose_alike(
    row: Row, stages: tuple[int, ...]
) -> None:
    model, inputs = row.model(), row.inputs()
    count = len(inputs["input_ids"])
    with stages_of(model, stages, first := MostAttended(), LAST_ROW).installed():
        _, together = generate(row, model, inputs, 2)
    for rows, pads in [([sample], 0) for sample in range(count)] + [(list(range(count))[::-1], 4)]:
        with stages_of(model, stages, choose := MostAttended(), LAST_ROW).installed():
            _, steps = generate(row, model, row.inputs(rows, pads), 2)
        exact(steps, together[rows], atol=row.tolerance() * scale(together))
        for one, other in zip(choose.seen, first.seen, strict=True):
            exact(one.attention, other.attention[rows], atol=row.tolerance())
    with stages_of(model, stages, beams := MostAttended(), LAST_ROW).installed():
        torch.manual_seed(3)
        tokens, steps = generate(row, model, inputs, **SAMPLED_BEAMS)
    assert all(map(torch.equal, beams.keeps, first.keeps)), "the batch before beams are expanded"
    with masked(model, inputs, stages, first.keeps):
        torch.manual_seed(3)
        expected_tokens, expected = generate(row, model, inputs, **SAMPLED_BEAMS)
    exact(steps, expected, atol=row.tolerance() * scale(expected))
    assert torch.equal(tokens, expected_tokens)


@every_model
def test_keeping_everything_changes_nothing_nor_does_text_alone_run_pruned(row: Row) -> None:
    model, inputs = row.model(), row.inputs()
    full = model(**row.oracle.forward_inputs(inputs)).logits
    words = {"input_ids": torch.arange(10, 30).view(2, 10), "decoder_input_ids": torch.zeros(2, 1, dtype=torch.long)}
    plain = model.language_model(**words).logits
    with stages_of(model, STAGES, lambda prompt: prompt.tokens).installed():
        assert torch.equal(model(**row.oracle.forward_inputs(inputs)).logits, full)
        assert torch.equal(model.language_model(**words).logits, plain)


@every_model
def test_the_loss_is_the_masked_runs(row: Row) -> None:
    model, inputs = row.model(), row.inputs()
    labels, keeps = row.oracle.labels(inputs), chosen(inputs, row, STAGES)
    with stages_of(model, STAGES, Uneven()).installed():
        loss = model(**inputs, labels=labels).loss
    with masked(model, inputs, STAGES, keeps):
        expected = model(**inputs, labels=labels).loss
    exact(loss, expected, atol=row.tolerance() * expected.item())
    assert abs(loss - model(**inputs, labels=labels).loss) > 1e-3 * loss


@every_model
def test_the_model_is_what_it_was_after_return_and_after_exceptions(row: Row) -> None:
    model, inputs = settled(row), row.oracle.forward_inputs(row.inputs())
    before, full = footprint(model), model(**inputs).logits
    site = stages_of(model, STAGES, Uneven())
    hook = model.language_model.encoder.block[2].register_forward_hook(fail)
    with site.installed():
        with pytest.raises(PlantedError):
            model(**inputs)
        assert site._prefill is None, "nothing of a prompt is held"
        hook.remove()
        assert not torch.equal(model(**inputs).logits, full)
        site.active = False
        assert torch.equal(model(**inputs).logits, full)
    assert footprint(model) == before
    assert torch.equal(model(**inputs).logits, full)


@every_model
@pytest.mark.parametrize("scorer", ["fastv", "pyramiddrop", "sparsevlm", "dart", "visual-exit"])
def test_methods_that_choose_inside_the_language_model_choose_inside_the_encoder(row: Row, scorer: str) -> None:
    args = {"fastv": {"layer": 1}, "dart": {"layer": 1}}.get(scorer, {})
    model, inputs = row.model(), row.inputs()
    with prune(model, PruningPolicy(scorer, args, keep=0.5)) as pruning:
        _, steps = generate(row, model, inputs)
    _, full = generate(row, model, inputs)
    assert pruning.keep is not None and (pruning.keep.sum(1) < row.oracle.tokens(inputs).sum(1)).all()
    assert scale(steps - full) > 0.01 * scale(full)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (SiteSettings((0,)), r"at the layers \[0\] of T5Stack, which has 3: give ascending numbers from 1 to 2"),
        (SiteSettings((3,)), r"at the layers \[3\] of T5Stack"),
        (SiteSettings((1,), compact=True), "layers before it have used the positions"),
        (SiteSettings((1,), {Signal.LAST_TOKEN_ATTENTION: (1,)}), r"by then layers 0 to 0 have run"),
    ],
)
def test_what_cannot_be_is_refused(settings: SiteSettings, says: str) -> None:
    with pytest.raises(PruningError, match=says):
        PruneAtEncoderLayers(find_family(MODELS[0].model()), Uneven(), settings)


def test_encoder_states_of_another_prompt_are_refused() -> None:
    row = MODELS[0]
    model, inputs = row.model(), row.inputs()
    with stages_of(model, STAGES, Uneven()).installed():
        first = _encoded(row, inputs)
        _encoded(row, inputs)
        with pytest.raises(PruningError, match="not filled by the last pruned prompt"):
            model.language_model.decoder(
                input_ids=torch.zeros(len(first), 1, dtype=torch.long), encoder_hidden_states=first
            )


def _encoded(row: Row, inputs: Inputs) -> Tensor:
    states: Tensor = row.model()(**row.oracle.forward_inputs(inputs)).language_model_outputs.encoder_last_hidden_state
    return states
