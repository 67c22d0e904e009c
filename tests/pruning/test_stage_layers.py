"""What the layers after a stage are given, and that nothing of a prompt stays."""

import weakref
from dataclasses import replace

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from catp_lightning import PruningError, PruningPolicy, Stage, prune
from catp_lightning.models import find_family
from catp_lightning.pruning.sites import SiteSettings
from catp_lightning.pruning.sites.decoder_layers import PruneAtDecoderLayers
from catp_lightning.pruning.sites.stage_prompt import StagePrompt
from tests.support.families import BY_NAME
from tests.support.footprints import footprint
from tests.support.matrix import STEPS, PlantedError, exact, fail, generate, scale
from tests.support.oracles import columns_kept
from tests.support.rows import Row
from tests.support.stages import (
    LAST_ROW,
    LAYERS,
    LLAMA,
    OPT,
    MostAttended,
    Uneven,
    check_dropping,
    chosen,
    every_model,
    given_to,
    masked,
    model_of,
    stack_of,
    stages_of,
)

pytestmark = pytest.mark.usefixtures("no_grad")
TOO_EARLY = PruningPolicy("l2-norm", then=[Stage("fastv", {"layer": 1}, keep=0.25)])


@every_model
def test_keeping_everything_changes_nothing(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    full, (tokens, steps) = model(**inputs).logits, generate(row, model, inputs)
    with stages_of(model, (1, 3), lambda prompt: prompt.tokens).installed():
        assert torch.equal(model(**inputs).logits, full)
        kept_tokens, kept_steps = generate(row, model, inputs)
    assert torch.equal(kept_tokens, tokens) and torch.equal(kept_steps, steps)


def test_a_first_stage_that_keeps_everything_leaves_its_layers_whole() -> None:
    model, inputs, stages = model_of(LLAMA), LLAMA.inputs(), (1, 3)
    keeps = [LLAMA.oracle.tokens(inputs), chosen(inputs, LLAMA, (1,))[0]]
    with stages_of(model, stages, lambda prompt: keeps[prompt.stage]).installed(), given_to(LLAMA, model) as given:
        _, steps = generate(LLAMA, model, inputs)
    masks = [[call["attention_mask"] for call in given[layer]] for layer in (0, 2)]
    assert all(one is other for one, other in zip(*masks, strict=True)), "not even copied"
    with masked(LLAMA, model, inputs, stages, keeps):
        _, expected = generate(LLAMA, model, inputs)
    exact(steps, expected, atol=1e-10 * scale(steps))


def test_what_has_left_cannot_be_chosen_again() -> None:
    model, inputs, stages = model_of(LLAMA), LLAMA.inputs(), (1, 3)
    keeps = [keep := chosen(inputs, LLAMA, (1,))[0], torch.ones_like(keep)]
    with stages_of(model, stages, lambda prompt: keeps[prompt.stage]).installed():
        logits = model(**inputs).logits
    with stages_of(model, (1,), lambda prompt: keep).installed():
        assert torch.equal(model(**inputs).logits, logits)


@every_model
def test_layers_are_given_the_positions_of_the_rows_that_are_left(row: Row) -> None:
    """Flash attention reads position ids where rotary embeddings do not."""
    model, inputs = model_of(row), row.inputs([1])
    keep = chosen(inputs, row, (2,), [1])[0]
    with stages_of(model, (2,), lambda prompt: keep).installed(), given_to(row, model) as given:
        model(**inputs)
    columns = columns_kept(inputs, keep)[0]
    for layer in (2, 3):
        for name in ("position_ids", "position_embeddings"):
            if (full := given[layer - 2][0].get(name)) is not None:  # Gemma 3 rotates every other layer alike
                short = given[layer][0][name]
                full, short = (x if isinstance(x, tuple) else (x[..., None],) for x in (full, short))
                for one, other in zip(full, short, strict=True):
                    assert torch.equal(one.expand(*one.shape[:-3], 1, -1, -1)[..., columns, :], other)


def test_without_padding_and_with_equal_numbers_kept_no_mask_is_needed() -> None:
    """The kernels of sdpa that take no mask are the fast ones."""
    model, inputs, stages = model_of(LLAMA), LLAMA.inputs([0, 0]), (2,)
    keeps = [torch.arange(9).expand(2, -1) % 2 == 0]
    with stages_of(model, stages, lambda prompt: keeps[0]).installed(), given_to(LLAMA, model) as given:
        _, steps = generate(LLAMA, model, inputs)
    assert [call["attention_mask"] for call in given[3]] == [None] * STEPS
    with masked(LLAMA, model, inputs, stages, keeps):
        _, expected = generate(LLAMA, model, inputs)
    exact(steps, expected, atol=1e-10 * scale(steps))


def test_text_alone_runs_unpruned() -> None:
    model, inputs = model_of(LLAMA), {"input_ids": torch.arange(10, 30).view(2, 10)}
    _, plain = generate(LLAMA, model, inputs)
    with stages_of(model, (1, 3), Uneven()).installed():
        _, steps = generate(LLAMA, model, inputs)
    assert torch.equal(steps, plain)


@pytest.mark.slow
@every_model
def test_the_model_is_what_it_was_after_return_and_after_exceptions(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    full, before = model(**inputs).logits, footprint(model)  # transformers puts hooks of its own at the first call
    with stages_of(model, (1, 3), MostAttended(), observe=True).installed():
        assert footprint(model) != before
        pruned = model(**inputs).logits
    assert footprint(model) == before
    failing = PruneAtDecoderLayers(find_family(model), fail, SiteSettings((1, 3), LAST_ROW))
    with pytest.raises(PlantedError), failing.installed():
        model(**inputs)
    assert footprint(model) == before
    hook = stack_of(row, model).layers[2].register_forward_hook(fail)
    with (dropper := stages_of(model, (1, 3), MostAttended(), observe=True)).installed():
        with pytest.raises(PlantedError):
            generate(row, model, inputs)
        hook.remove()
        assert torch.equal(model(**inputs).logits, pruned), "the next call is pruned like the first"
        dropper.active = False
        assert torch.equal(model(**inputs).logits, full)
    assert footprint(model) == before
    assert torch.equal(model(**inputs).logits, full)


def test_nothing_of_a_prompt_is_held_after_its_prefill() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    held: list[weakref.ref[Tensor]] = []

    def choose(prompt: StagePrompt) -> Tensor:
        held.extend(map(weakref.ref, (prompt.embeds, prompt.attention)))
        return prompt.tokens & (torch.arange(prompt.tokens.shape[1]) < 3)

    with stages_of(model, (1, 3), choose, observe=True).installed():
        model(**inputs)
        assert [reference() for reference in held] == [None] * 4


@every_model
def test_bfloat16_is_finite(row: Row) -> None:
    model, inputs = model_of(row, torch.bfloat16), row.inputs(dtype=torch.bfloat16)
    with stages_of(model, (1, 3), choose := MostAttended(), observe=True).installed():
        assert model(**inputs).logits.isfinite().all()
        _, steps = generate(row, model, inputs)
    assert steps.isfinite().all()
    assert all(prompt.attention.dtype == torch.float32 for prompt in choose.seen)


def test_two_models_are_pruned_at_once_without_meeting() -> None:
    models, inputs = [model_of(LLAMA), model_of(OPT)], [LLAMA.inputs(), OPT.inputs()]
    droppers = [stages_of(model, (1, 3), MostAttended(), observe=True) for model in models]
    alone = []
    for dropper, model, given in zip(droppers, models, inputs, strict=True):
        with dropper.installed():
            alone.append(model(**given).logits)
    with droppers[0].installed(), droppers[1].installed():
        for turn in (1, 0, 0, 1):
            assert torch.equal(models[turn](**inputs[turn]).logits, alone[turn])


def test_gradients_reach_the_tokens_that_stay_and_no_others_beyond_the_stage() -> None:
    model, inputs, stages = model_of(LLAMA), LLAMA.inputs([0]), (1,)
    keep = torch.arange(9)[None] % 3 == 0
    hidden: list[Tensor] = []
    hook = stack_of(LLAMA, model).layers[0].register_forward_hook(lambda module, args, output: hidden.append(output))
    with torch.enable_grad(), stages_of(model, stages, lambda prompt: keep).installed():
        logits = model(**inputs).logits[:, -1]
        (gradient,) = torch.autograd.grad(logits.square().sum(), hidden)
    hook.remove()
    assert torch.equal(gradient[0].abs().sum(-1) > 0, columns_kept(inputs, keep)[0])


def deepstack() -> PreTrainedModel:
    """Qwen3-VL that adds features after its first two layers."""
    config = BY_NAME["Qwen3-VL"].make().config
    config.vision_config.deepstack_visual_indexes = [0, 1]
    config.text_config.num_hidden_layers = LAYERS
    return hf.Qwen3VLForConditionalGeneration(config)


@pytest.mark.slow
def test_where_features_are_added_after_early_layers_tokens_leave_only_after_the_last_of_them() -> None:
    row = replace(BY_NAME["Qwen3-VL"], make=deepstack)
    model, inputs = model_of(row), row.inputs()
    for stages in ((1, 3), (0, 1, 3)):
        with (
            stages_of(model, stages, Uneven()).installed(),
            pytest.raises(PruningError, match=r"each of its first 2 layers.*choose layers from 2 on"),
        ):
            model(**inputs)
    for stages in ((2,), (2, 3), (0, 2, 3)):
        with stages_of(model, stages, MostAttended(), observe=True).installed():
            model(**inputs)
        check_dropping(row, model, inputs, stages, moves=0.1, tolerance=1e-10)
    with pytest.raises(PruningError, match="choose layers from 2 on"), prune(model, TOO_EARLY):
        pass
