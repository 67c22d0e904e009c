"""Dropping inside the decoder equals hiding the same tokens from the layers after it."""

import re
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from catp_lightning import PruningError
from catp_lightning.methods.observation import Signal
from catp_lightning.models import find_family
from catp_lightning.prompt.masks import layer_mask
from catp_lightning.prompt.prompt import DecoderPrompt
from catp_lightning.pruning.sites.decoder_layers import PruneAtDecoderLayers
from catp_lightning.pruning.sites.stage_prompt import DecoderPrefill, StagePrompt
from tests.support.families import BY_NAME, Row
from tests.support.footprints import footprint
from tests.support.matrix import BEAMS, SAMPLED, SEVERAL, STEPS, PlantedError, exact, fail, generate, scale
from tests.support.oracles import IMAGE, Inputs, cache_of, columns_kept, of_rows
from tests.support.stages import (
    LAST_ROW,
    LAYERS,
    LLAMA,
    MISTRAL,
    OPT,
    QUESTIONED,
    MostAttended,
    Uneven,
    chosen,
    every_model,
    every_stage,
    given_to,
    makes_positions,
    masked,
    model_of,
    stack_of,
    stages_of,
)

pytestmark = pytest.mark.usefixtures("no_grad")


@every_model
@every_stage
@pytest.mark.parametrize(
    ("dtype", "attention"), [(torch.float32, "sdpa"), (torch.float64, "sdpa"), (torch.float32, "eager")], ids=str
)
def test_dropping_equals_hiding_from_later_layers_in_prefill_and_decoding(
    row: Row, stages: tuple[int, ...], dtype: torch.dtype, attention: str
) -> None:
    model, inputs = model_of(row, dtype, attention), row.inputs(dtype=dtype)
    full, keeps, choose = model(**inputs).logits, chosen(inputs, row, stages), Uneven()
    with stages_of(model, stages, choose).dropping():
        prefill = model(**inputs).logits
        assert [keep.tolist() for keep in choose.keeps] == [keep.tolist() for keep in keeps], "once a stage and prefill"
        tokens, steps = generate(row, model, inputs)
    assert len(choose.keeps) == 2 * len(stages), "decoding steps choose nothing"
    assert len(set(keeps[-1].sum(1).tolist())) > 2, "samples keep different numbers"
    with masked(row, model, inputs, stages, keeps):
        oracle = model(**inputs).logits
        oracle_tokens, oracle_steps = generate(row, model, inputs)
    rows, atol = row.oracle.compared(inputs, keeps[-1]), row.tolerance(dtype, attention) * scale(full)
    assert scale(oracle[rows] - full[rows]) > 0.1 * scale(full), "dropping must move logits, or this proves nothing"
    exact(prefill[rows], oracle[rows], atol=atol)
    exact(steps, oracle_steps, atol=atol)
    assert torch.equal(tokens, oracle_tokens)


@every_model
@every_stage
def test_caches_are_as_long_as_what_is_left(row: Row, stages: tuple[int, ...]) -> None:
    model, inputs = model_of(row), row.inputs([1, 1, 1])  # of one length, so that nothing is padding
    keeps = chosen(inputs, row, stages)
    longest = [inputs["input_ids"].shape[1]] + [int(columns_kept(inputs, keep).sum(1).max()) for keep in keeps]
    assert longest == sorted({*longest}, reverse=True), "every stage must shorten the longest sample"
    with stages_of(model, stages, Uneven()).dropping():
        cache = cache_of(model(**inputs, use_cache=True))
    lengths = [cache.get_seq_length(layer) for layer in range(LAYERS)]
    assert lengths == [longest[sum(stage <= layer for stage in stages)] for layer in range(LAYERS)]


@every_model
def test_hidden_states_come_back_at_full_length_with_zeros_for_rows_that_are_gone(row: Row) -> None:
    model, inputs, stages = model_of(row), row.inputs(), (1, 3)
    keeps, stack = chosen(inputs, row, stages), stack_of(row, model)
    outputs: list[Any] = []
    hook = stack.register_forward_hook(lambda module, args, output: outputs.append(output))
    with stages_of(model, stages, Uneven()).dropping():
        hook.remove()  # and after the one that hands the output back
        hook = stack.register_forward_hook(lambda module, args, output: outputs.append(output))
        model(**inputs, output_hidden_states=True)
    with masked(row, model, inputs, stages, keeps):
        model(**inputs, output_hidden_states=True)
    hook.remove()
    got, expected = outputs
    assert torch.equal(got.hidden_states[-1], got.last_hidden_state)
    left = [torch.ones_like(keeps[0])] * 2 + [keeps[0]] * 2 + [keeps[1]]
    for ours, theirs, keep in zip(got.hidden_states, expected.hidden_states, left, strict=True):
        columns = columns_kept(inputs, keep)
        assert ours.shape == theirs.shape
        assert not ours[~columns].any()
        rows = columns & inputs["attention_mask"].bool()
        exact(ours[rows], theirs[rows], atol=1e-10 * scale(theirs))


@every_model
@pytest.mark.parametrize("settings", [BEAMS, SEVERAL, SAMPLED], ids=["beams", "sequences", "sampling"])
def test_beams_and_sampling_find_what_the_masked_model_finds(row: Row, settings: dict[str, Any]) -> None:
    model, inputs, stages = model_of(row), row.inputs(), (1, 3)
    with stages_of(model, stages, choose := Uneven()).dropping():
        torch.manual_seed(3)
        tokens, steps = generate(row, model, inputs, **settings)
    keeps = chosen(inputs, row, stages)
    assert all(map(torch.equal, choose.keeps, keeps)), "the batch before beams are expanded"
    with masked(row, model, inputs, stages, keeps):
        torch.manual_seed(3)
        masked_tokens, masked_steps = generate(row, model, inputs, **settings)
    assert torch.equal(tokens, masked_tokens)
    exact(steps, masked_steps, atol=1e-10 * scale(steps))


@every_model
def test_attention_decides_the_same_for_beams_and_without_a_cache(row: Row) -> None:
    # One image a sample: older versions of generate mix several up when they expand pixels for beams.
    model, inputs = model_of(row), row.inputs([0, 2])
    prefills = []
    for settings in ({}, {"num_beams": 3}, {"use_cache": False}):
        with stages_of(model, (1, 3), choose := MostAttended(), observe=True).dropping():
            tokens, steps = generate(row, model, inputs, **settings)
        prefills.append((choose.keeps, choose.seen, tokens, steps))
    (cached, seen, tokens, steps), (beams, beams_seen, *_), (uncached, uncached_seen, *again) = prefills
    assert len(cached) == len(beams) == 2
    assert len(uncached) == (2 if row in (OPT, QUESTIONED) else 2 * STEPS), "BLIP-2's generate always has a cache"
    for at in range(len(uncached)):
        assert torch.equal(uncached[at], cached[at % 2]), "the choice belongs to the prompt"
        exact(uncached_seen[at].attention, seen[at % 2].attention, atol=1e-10)
    for ours, theirs, one, other in zip(beams, cached, beams_seen, seen, strict=True):
        assert torch.equal(ours, theirs)
        exact(one.attention, other.attention, atol=1e-10)
    assert torch.equal(again[0], tokens)
    exact(again[1], steps, atol=1e-10 * scale(steps))


@every_model
def test_generate_and_forward_observe_the_same_row(row: Row) -> None:
    model, inputs = model_of(row), row.inputs([1])
    with stages_of(model, (1, 3), choose := MostAttended(), observe=True).dropping():
        model(**inputs)
        generate(row, model, inputs)
    for stage in (0, 1):
        exact(choose.seen[stage].attention, choose.seen[stage + 2].attention, atol=1e-10)


@every_model
def test_a_decoding_loop_by_hand_equals_generate(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    with stages_of(model, (1, 3), Uneven()).dropping():
        tokens, steps = generate(row, model, inputs)
        looped = torch.stack([*row.oracle.loop(model, inputs, tokens, with_positions=True)], 1)
    exact(looped, steps, atol=1e-10 * scale(steps))


@makes_positions
def test_a_decoding_loop_by_hand_without_position_ids_equals_the_masked_loop(row: Row) -> None:
    model, inputs, stages = model_of(row), row.inputs(), (1, 3)
    tokens = inputs["input_ids"][:, -STEPS:]
    with stages_of(model, stages, Uneven()).dropping():
        looped = torch.stack([*row.oracle.loop(model, inputs, tokens, with_positions=False)], 1)
    with masked(row, model, inputs, stages, chosen(inputs, row, stages)):
        expected = torch.stack([*row.oracle.loop(model, inputs, tokens, with_positions=False)], 1)
    exact(looped, expected, atol=1e-10 * scale(expected))


@makes_positions
def test_a_cache_expanded_after_the_prefill_decodes_each_copy_alike(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    token = inputs["input_ids"][:, -1:]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
    decode, logits = model.get_submodule(row.oracle.stepper), []
    for copies in (1, 2):
        with stages_of(model, (1, 3), Uneven()).dropping():
            cache = cache_of(model(**inputs, use_cache=True))
            cache.batch_repeat_interleave(copies)
            ids, more = of_rows(token, copies * len(token)), of_rows(mask, copies * len(mask))
            logits.append(decode(input_ids=ids, attention_mask=more, past_key_values=cache).logits[:, -1])
    exact(logits[1], of_rows(logits[0], 2 * len(token)), atol=1e-10 * scale(logits[0]))


@every_model
def test_a_sample_does_not_depend_on_its_batch_or_padding(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    count, stages = len(inputs["input_ids"]), (1, 3)
    with stages_of(model, stages, first := MostAttended(), observe=True).dropping():
        _, together = generate(row, model, inputs)
    for rows, pads in [([sample], 0) for sample in range(count)] + [(list(range(count))[::-1], 4)]:
        part = row.inputs(rows, pads)
        with stages_of(model, stages, choose := MostAttended(), observe=True).dropping():
            _, steps = generate(row, model, part)
        exact(steps, together[rows], atol=1e-10 * scale(together))
        for one, other in zip(choose.seen, first.seen, strict=True):
            found = other.attention[rows, :, : one.attention.shape[2]]
            exact(one.attention, found, atol=1e-10)


@every_model
@every_stage
def test_the_loss_leaves_out_labels_predicted_from_rows_gone_at_the_last_stage(
    row: Row, stages: tuple[int, ...]
) -> None:
    model, inputs = model_of(row), row.inputs()
    labels = row.oracle.labels(inputs)
    given, keeps = labels.clone(), chosen(inputs, row, stages)
    with (dropper := stages_of(model, stages, Uneven())).dropping():
        loss = model(**inputs, labels=labels).loss
    left_out = row.oracle.left_out(inputs, labels, keeps[-1])
    assert left_out.any() and dropper.labels_left_out == left_out.sum()
    assert torch.equal(labels, given), "the caller's labels are not changed"
    unpruned = model(**inputs, labels=labels).loss
    with masked(row, model, inputs, stages, keeps):
        expected = model(**inputs, labels=labels.masked_fill(left_out, -100)).loss
    exact(loss, expected, atol=1e-10 * expected.item())
    assert abs(loss - unpruned) > 1e-3 * unpruned


def paid_by(maps: Tensor, at: Tensor, inputs: Inputs, row: Row) -> Tensor:
    """Of maps [B, H, L, L], what the row `at`, int64 [B], pays the visual tokens: [B, H, T]."""
    visual = ~columns_kept(inputs, torch.zeros_like(row.oracle.tokens(inputs)))
    found = torch.zeros(*maps.shape[:2], int(visual.sum(1).max()), dtype=maps.dtype)
    for sample, columns in enumerate(visual):
        found[sample, :, : columns.sum()] = maps[sample, :, at[sample], columns]
    return found


# Padded rows of eager attention are NaN in float64: its softmax is in float32, where its mask overflows.
WHOLE, ALONE = (torch.float32, "eager", None), (torch.float64, "sdpa", [1])


@every_model
@pytest.mark.parametrize(("dtype", "attention", "samples"), [WHOLE, ALONE], ids=["eager", "sdpa"])
def test_the_observed_row_is_that_of_an_eager_run(
    row: Row, dtype: torch.dtype, attention: str, samples: list[int] | None
) -> None:
    model, inputs, stages = model_of(row, dtype, attention), row.inputs(samples, dtype=dtype), (1, 3)
    mask = inputs["attention_mask"]
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    with stages_of(model, stages, choose := MostAttended(), observe=True).dropping():
        observed = model(**inputs).logits
    keeps = choose.keeps
    with stages_of(model, stages, lambda prompt: keeps[prompt.stage]).dropping():
        assert torch.equal(model(**inputs).logits, observed), "observing changes nothing"
    eager = model_of(row, dtype, "eager")
    with masked(row, eager, inputs, stages, keeps):
        maps = eager(**inputs, output_attentions=True)
        maps = maps.get("language_model_outputs", maps).attentions
    first, second = choose.seen
    assert first.attention.max() > 0.05
    for prompt, layer in ((first, 0), (second, 2)):
        paid = paid_by(maps[layer], last, inputs, row) * prompt.tokens[:, None]
        exact(prompt.attention, paid, atol=1e-6)
    assert torch.equal(second.tokens, keeps[0])


@every_model
def test_with_labels_the_row_before_the_first_label_is_observed(row: Row) -> None:
    model, inputs = model_of(row, torch.float32, "eager"), row.inputs(dtype=torch.float32)
    real, length = inputs["attention_mask"].bool(), inputs["input_ids"].shape[1]
    labels = torch.where(real & (torch.arange(length) >= length - 3), inputs["input_ids"], -100)
    labels[0] = torch.where(real[0], inputs["input_ids"][0], -100)  # no row is before its first label
    before = torch.full((len(real),), length - 4)
    before[0] = real[0].long().argmax()
    maps = model(**inputs, output_attentions=True)
    maps = maps.get("language_model_outputs", maps).attentions[0]
    with stages_of(model, (1,), choose := MostAttended(), observe=True).dropping():
        model(**inputs, labels=labels)
        answered = {**inputs, "input_ids": torch.where(torch.arange(length) < length - 3, inputs["input_ids"], 50)}
        model(**answered, labels=torch.where(labels == -100, -100, answered["input_ids"]))
    exact(choose.seen[0].attention, paid_by(maps, before, inputs, row), atol=1e-6)
    exact(choose.seen[1].attention, choose.seen[0].attention, atol=1e-6)
    assert torch.equal(*choose.keeps), "a changed answer changes no choice"


def test_where_the_prompt_ends_in_an_image_the_last_row_still_there_is_observed() -> None:
    row, model, eager = LLAMA, model_of(LLAMA), model_of(LLAMA, attention="eager")
    inputs = {**LLAMA.inputs([0, 0]), "input_ids": torch.tensor([[5, 8, 13] + [IMAGE] * 9] * 2)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    seen: list[StagePrompt] = []
    keeps = [torch.arange(9) < torch.tensor([[6], [9]]), torch.arange(9) < torch.tensor([[2], [9]])]

    def choose(prompt: StagePrompt) -> Tensor:
        seen.append(prompt)
        return keeps[prompt.stage]

    with stages_of(model, (1, 3), choose, observe=True).dropping():
        model(**inputs)
    with masked(row, eager, inputs, (1, 3), keeps):
        maps = eager(**inputs, output_attentions=True).attentions
    for prompt, layer, last in ((seen[0], 0, [11, 11]), (seen[1], 2, [8, 11])):
        paid = paid_by(maps[layer], torch.tensor(last), inputs, row) * prompt.tokens[:, None]
        exact(prompt.attention, paid, atol=1e-6)


NO_PADS, PADS = [[1] * 7] * 2, [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1, 1]]


def small_prefill(mask: Tensor) -> DecoderPrefill:
    """Two samples, a beam of two each; visual tokens in columns 2 to 5 of 7, of the second in 2 and 3."""
    visual = torch.zeros(2, 7, dtype=torch.bool)
    visual[0, 2:6], visual[1, 2:4] = True, True
    rows, positions = of_rows(mask, 4), torch.arange(7).expand(4, -1)
    is_prompt = (torch.arange(7) < 6) & mask.bool()  # the last column is not the one that asks
    prompt = DecoderPrompt.of({}, 2, visual.long(), visual, torch.zeros(4, 7, 8), rows, positions, is_prompt)
    return DecoderPrefill(prompt, {})


@pytest.mark.parametrize("pads", [NO_PADS, PADS], ids=["no pads", "pads"])
def test_masks_of_flash_attention_say_what_those_of_sdpa_say(pads: list[list[int]]) -> None:
    """They have two dimensions or are None, and are causal all the same."""
    mask = torch.tensor(pads)
    prefill, given = small_prefill(mask), of_rows(mask, 4)
    full = torch.ones(7, 7, dtype=torch.bool).tril() & given[:, None, None].bool()
    query, key = torch.randn(4, 6, 7, 8), torch.randn(4, 2, 7, 8)
    paid = prefill.last_row(query, key, full, 0.5)
    exact(prefill.last_row(query, key, given, 0.5), paid, atol=1e-6)
    if pads is NO_PADS:
        exact(prefill.last_row(query, key, None, 0.5), paid, atol=1e-6)
    prefill.narrow(torch.tensor([[True, False, False, True], [False, True, False, False]]))
    rows, n = prefill.rows, prefill.rows.order.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    short, flash = layer_mask(full, rows, 0, flash=False), layer_mask(given, rows, 0, flash=True)
    assert torch.equal(short, causal & flash[:, None, None].bool())
    assert flash.sum(1).tolist() == ([5, 5, 6, 6] if pads is NO_PADS else [3, 3, 5, 5]), "fillers are hidden"
    query, key = query[:, :, :n], key[:, :, :n]
    exact(prefill.last_row(query, key, flash, 0.5), prefill.last_row(query, key, short, 0.5), atol=1e-6)
    later = torch.cat([given, torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]])], 1)
    decoding = layer_mask(later[:, None, None].bool(), rows, 2, flash=False)
    assert torch.equal(decoding[:, 0, 0].long(), layer_mask(later, rows, 2, flash=True))
    if pads is NO_PADS:
        assert torch.equal(layer_mask(None, rows, 0, flash=True), flash), "gaps are not read as packed sequences"
        assert torch.equal(layer_mask(None, rows, 0, flash=False), short)
        assert layer_mask(None, rows, 2, flash=True).sum(1).tolist() == [7, 7, 8, 8]
        assert layer_mask(None, rows, 2, flash=False).sum(3).flatten().tolist() == [7, 7, 8, 8]


def test_scorers_see_the_tokens_that_are_still_there_as_one_image_a_sample() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    with stages_of(model, (1, 3), choose := MostAttended(), observe=True).dropping():
        model(**inputs)
    seen = choose.seen[1].observation()
    assert torch.equal(seen.valid, choose.keeps[0])
    assert torch.equal(seen.by_layer(Signal.LAST_TOKEN_ATTENTION, (-1,))[:, 0], choose.seen[1].attention)


@every_model
def test_keeping_everything_changes_nothing(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    full, (tokens, steps) = model(**inputs).logits, generate(row, model, inputs)
    with stages_of(model, (1, 3), lambda prompt: prompt.tokens).dropping():
        assert torch.equal(model(**inputs).logits, full)
        kept_tokens, kept_steps = generate(row, model, inputs)
    assert torch.equal(kept_tokens, tokens) and torch.equal(kept_steps, steps)


def test_a_first_stage_that_keeps_everything_leaves_its_layers_whole() -> None:
    model, inputs, stages = model_of(LLAMA), LLAMA.inputs(), (1, 3)
    keeps = [LLAMA.oracle.tokens(inputs), chosen(inputs, LLAMA, (1,))[0]]
    with stages_of(model, stages, lambda prompt: keeps[prompt.stage]).dropping(), given_to(LLAMA, model) as given:
        _, steps = generate(LLAMA, model, inputs)
    masks = [[call["attention_mask"] for call in given[layer]] for layer in (0, 2)]
    assert all(one is other for one, other in zip(*masks, strict=True)), "not even copied"
    with masked(LLAMA, model, inputs, stages, keeps):
        _, expected = generate(LLAMA, model, inputs)
    exact(steps, expected, atol=1e-10 * scale(steps))


def test_what_has_left_cannot_be_chosen_again() -> None:
    model, inputs, stages = model_of(LLAMA), LLAMA.inputs(), (1, 3)
    keeps = [keep := chosen(inputs, LLAMA, (1,))[0], torch.ones_like(keep)]
    with stages_of(model, stages, lambda prompt: keeps[prompt.stage]).dropping():
        logits = model(**inputs).logits
    with stages_of(model, (1,), lambda prompt: keep).dropping():
        assert torch.equal(model(**inputs).logits, logits)


@every_model
def test_layers_are_given_the_positions_of_the_rows_that_are_left(row: Row) -> None:
    """Flash attention reads position ids where rotary embeddings do not."""
    model, inputs = model_of(row), row.inputs([1])
    keep = chosen(inputs, row, (2,), [1])[0]
    with stages_of(model, (2,), lambda prompt: keep).dropping(), given_to(row, model) as given:
        model(**inputs)
    columns = columns_kept(inputs, keep)[0]
    for layer in (2, 3):
        for name in ("position_ids", "position_embeddings"):
            if (full := given[0][0].get(name)) is not None:
                short = given[layer][0][name]
                full, short = (x if isinstance(x, tuple) else (x[..., None],) for x in (full, short))
                for one, other in zip(full, short, strict=True):
                    assert torch.equal(one.expand(*one.shape[:-3], 1, -1, -1)[..., columns, :], other)


def test_without_padding_and_with_equal_numbers_kept_no_mask_is_needed() -> None:
    """The kernels of sdpa that take no mask are the fast ones."""
    model, inputs, stages = model_of(LLAMA), LLAMA.inputs([0, 0]), (2,)
    keeps = [torch.arange(9).expand(2, -1) % 2 == 0]
    with stages_of(model, stages, lambda prompt: keeps[0]).dropping(), given_to(LLAMA, model) as given:
        _, steps = generate(LLAMA, model, inputs)
    assert [call["attention_mask"] for call in given[3]] == [None] * STEPS
    with masked(LLAMA, model, inputs, stages, keeps):
        _, expected = generate(LLAMA, model, inputs)
    exact(steps, expected, atol=1e-10 * scale(steps))


def test_text_alone_runs_unpruned() -> None:
    model, inputs = model_of(LLAMA), {"input_ids": torch.arange(10, 30).view(2, 10)}
    _, plain = generate(LLAMA, model, inputs)
    with stages_of(model, (1, 3), Uneven()).dropping():
        _, steps = generate(LLAMA, model, inputs)
    assert torch.equal(steps, plain)


@every_model
def test_the_model_is_what_it_was_after_return_and_after_exceptions(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    before, full, refused = footprint(model), model(**inputs).logits, []
    with stages_of(model, (1, 3), MostAttended(), observe=True).dropping():
        assert footprint(model) != before
        pruned = model(**inputs).logits
    assert footprint(model) == before
    failing = PruneAtDecoderLayers(find_family(model), fail, False, lambda: refused.append(1), (1, 3), LAST_ROW)
    with pytest.raises(PlantedError), failing.dropping():
        model(**inputs)
    assert refused and footprint(model) == before
    hook = stack_of(row, model).layers[2].register_forward_hook(fail)
    with (dropper := stages_of(model, (1, 3), MostAttended(), observe=True)).dropping():
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

    with stages_of(model, (1, 3), choose, observe=True).dropping():
        model(**inputs)
        assert [reference() for reference in held] == [None] * 4


@every_model
def test_bfloat16_is_finite(row: Row) -> None:
    model, inputs = model_of(row, torch.bfloat16), row.inputs(dtype=torch.bfloat16)
    with stages_of(model, (1, 3), choose := MostAttended(), observe=True).dropping():
        assert model(**inputs).logits.isfinite().all()
        _, steps = generate(row, model, inputs)
    assert steps.isfinite().all()
    assert all(prompt.attention.dtype == torch.float32 for prompt in choose.seen)


def test_two_models_are_pruned_at_once_without_meeting() -> None:
    models, inputs = [model_of(LLAMA), model_of(OPT)], [LLAMA.inputs(), OPT.inputs()]
    droppers = [stages_of(model, (1, 3), MostAttended(), observe=True) for model in models]
    alone = []
    for dropper, model, given in zip(droppers, models, inputs, strict=True):
        with dropper.dropping():
            alone.append(model(**given).logits)
    with droppers[0].dropping(), droppers[1].dropping():
        for turn in (1, 0, 0, 1):
            assert torch.equal(models[turn](**inputs[turn]).logits, alone[turn])


def test_gradients_reach_the_tokens_that_stay_and_no_others_beyond_the_stage() -> None:
    model, inputs, stages = model_of(LLAMA), LLAMA.inputs([0]), (1,)
    keep = torch.arange(9)[None] % 3 == 0
    hidden: list[Tensor] = []
    hook = stack_of(LLAMA, model).layers[0].register_forward_hook(lambda module, args, output: hidden.append(output))
    with torch.enable_grad(), stages_of(model, stages, lambda prompt: keep).dropping():
        logits = model(**inputs).logits[:, -1]
        (gradient,) = torch.autograd.grad(logits.square().sum(), hidden)
    hook.remove()
    assert torch.equal(gradient[0].abs().sum(-1) > 0, columns_kept(inputs, keep)[0])


@pytest.mark.parametrize("stages", [(), (0,), (4,), (-1,), (2, 1), (1, 1), (1, 9)], ids=str)
def test_layers_that_do_not_exist_or_descend_are_refused(stages: tuple[int, ...]) -> None:
    with pytest.raises(PruningError, match=rf"at the layers {re.escape(str(list(stages)))}.*from 1 to 3"):
        stages_of(model_of(LLAMA), stages, Uneven())


def test_compact_positions_are_refused() -> None:
    with pytest.raises(PruningError, match="layers before it have used their position ids"):
        PruneAtDecoderLayers(find_family(model_of(LLAMA)), Uneven(), True, lambda: None, (2,))


@pytest.mark.parametrize("name", ["Gemma3", "Mistral3, sliding window"])
def test_sliding_layers_are_refused(name: str) -> None:
    with pytest.raises(PruningError, match="sliding_attention: which columns their caches hold"):
        stages_of(BY_NAME[name].model(), (2,), Uneven())


def test_layers_of_another_kind_are_refused() -> None:
    family = find_family(LLAMA.make())
    family.decoder_config.layer_types = ["linear_attention", "full_attention"] * 2
    with pytest.raises(PruningError, match="layers of type linear_attention"):
        PruneAtDecoderLayers(family, Uneven(), False, lambda: None, (2,))


def test_flex_attention_is_refused() -> None:
    model = LLAMA.make()
    model.model.language_model.config._attn_implementation = "flex_attention"
    with pytest.raises(PruningError, match=r"flex_attention.*eager, sdpa"):
        stages_of(model, (2,), Uneven())


@every_model
def test_a_static_cache_is_refused(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    before = footprint(model)
    with stages_of(model, (1, 3), Uneven()).dropping(), pytest.raises(PruningError, match="static cache"):
        generate(row, model, inputs, cache_implementation="static")
    assert footprint(model) == before


@every_model
def test_embeddings_without_ids_are_refused(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with stages_of(model, (1, 3), Uneven()).dropping(), pytest.raises(PruningError, match="inputs_embeds"):
        model(**{**inputs, "input_ids": None}, inputs_embeds=embeddings)


@makes_positions
def test_caches_of_other_prompts_and_cut_caches_are_refused(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    token, decode = inputs["input_ids"][:, -1:], model.get_submodule(row.oracle.stepper)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
    plain = cache_of(model(**inputs, use_cache=True))
    with stages_of(model, (1, 3), Uneven()).dropping():
        first, second = (cache_of(model(**inputs, use_cache=True)) for _ in range(2))
        for cache in (plain, first):
            with pytest.raises(PruningError, match="not filled by the last pruned prompt"):
                decode(input_ids=token, attention_mask=mask, past_key_values=cache)
        decode(input_ids=token, attention_mask=mask, past_key_values=second)
        second.crop(-2)  # a row of the prompt as well
        with pytest.raises(PruningError, match="changed since"):
            decode(input_ids=token, attention_mask=mask[:, :-1], past_key_values=second)
        third = cache_of(model(**inputs, use_cache=True))
        model.get_submodule(row.oracle.stepper)(input_ids=token)  # text alone
        with pytest.raises(PruningError, match="not filled by the last pruned prompt"):
            decode(input_ids=token, attention_mask=mask, past_key_values=third)


@pytest.mark.parametrize("row", [LLAMA, MISTRAL], ids=repr)
def test_an_image_after_what_is_cached_already_is_refused(row: Row) -> None:
    model, inputs = model_of(row), row.inputs([0])
    with stages_of(model, (1, 3), Uneven()).dropping():
        for before in ({"input_ids": inputs["input_ids"][:, :2]}, inputs):  # text alone, and a pruned prompt
            cache = model(**before, use_cache=True).past_key_values
            mask = torch.ones(1, cache.get_seq_length() + inputs["input_ids"].shape[1], dtype=torch.long)
            with pytest.raises(PruningError, match="An image came with a cache"):
                model(**{**inputs, "attention_mask": mask}, past_key_values=cache)


def deepstack() -> PreTrainedModel:
    """Qwen3-VL that adds features after its first two layers."""
    config = BY_NAME["Qwen3-VL"].make().config
    config.vision_config.deepstack_visual_indexes = [0, 1]
    config.text_config.num_hidden_layers = LAYERS
    return hf.Qwen3VLForConditionalGeneration(config)


def test_where_features_are_added_after_early_layers_tokens_leave_only_after_the_last_of_them() -> None:
    row = replace(BY_NAME["Qwen3-VL"], make=deepstack)
    model, inputs = model_of(row), row.inputs()
    with (
        stages_of(model, (1, 3), Uneven()).dropping(),
        pytest.raises(PruningError, match=r"each of its first 2 layers.*choose layers from 2 on"),
    ):
        model(**inputs)
    for stages in ((2,), (2, 3)):
        keeps, full = chosen(inputs, row, stages), model(**inputs).logits
        with stages_of(model, stages, MostAttended(), observe=True).dropping():
            model(**inputs)
        with stages_of(model, stages, Uneven()).dropping():
            prefill = model(**inputs).logits
            _, steps = generate(row, model, inputs)
        with masked(row, model, inputs, stages, keeps):
            oracle = model(**inputs).logits
            _, oracle_steps = generate(row, model, inputs)
        rows, atol = row.oracle.compared(inputs, keeps[-1]), 1e-10 * scale(full)
        assert scale(oracle[rows] - full[rows]) > 0.1 * scale(full)
        exact(prefill[rows], oracle[rows], atol=atol)
        exact(steps, oracle_steps, atol=atol)
