"""Dropping inside the decoder equals hiding the same tokens from the layers after it."""

from typing import Any

import pytest
import torch

from catp_lightning.methods.selection import Selection
from catp_lightning.models import find_family
from catp_lightning.pruning.sites import PruneAtDecoderLayers, SiteSettings
from tests.support.matrix import SAMPLED_BEAMS, STEPS, exact, generate, scale
from tests.support.oracles import CACHE, cache_of, columns_kept, of_rows
from tests.support.quick import quick
from tests.support.rows import Row
from tests.support.stages import (
    LATE,
    LAYERS,
    MODELS,
    OPT,
    QUESTIONED,
    MostAttended,
    Uneven,
    chosen,
    every_model_and_stage,
    every_schedule,
    makes_positions,
    masked,
    model_of,
    stack_of,
    stages_of,
)

pytestmark = pytest.mark.usefixtures("no_grad")


@every_model_and_stage
def test_dropping_equals_hiding_from_later_layers_in_prefill_and_decoding(row: Row, stages: tuple[int, ...]) -> None:
    _dropping_equals_hiding(row, stages, torch.float64, None)


@pytest.mark.parametrize("row", quick(MODELS, {"Llava", "Gemma3"}))
def test_dropping_equals_hiding_under_eager_attention_too(row: Row) -> None:
    _dropping_equals_hiding(row, LATE, torch.float32, "eager")


def _dropping_equals_hiding(row: Row, stages: tuple[int, ...], dtype: torch.dtype, attention: str | None) -> None:
    model, inputs = model_of(row, dtype, attention), row.inputs(dtype=dtype)
    full, keeps, choose = model(**inputs).logits, chosen(inputs, row, stages), Uneven()
    with stages_of(model, stages, choose).installed():
        prefill = model(**inputs).logits
        assert [keep.tolist() for keep in choose.keeps] == [keep.tolist() for keep in keeps], "once a stage and prefill"
        tokens, steps = generate(row, model, inputs)
    assert len(choose.keeps) == 2 * len(stages), "decoding steps choose nothing"
    assert len(set(keeps[-1].sum(1).tolist())) > 1, "samples keep different numbers"
    with masked(row, model, inputs, stages, keeps):
        oracle = model(**inputs).logits
        oracle_tokens, oracle_steps = generate(row, model, inputs)
    rows, atol = row.oracle.compared(inputs, keeps[-1]), row.tolerance(dtype, attention) * scale(full)
    assert scale(oracle[rows] - full[rows]) > 0.1 * scale(full), "dropping must move logits, or this proves nothing"
    exact(prefill[rows], oracle[rows], atol=atol)
    exact(steps, oracle_steps, atol=atol)
    assert torch.equal(tokens, oracle_tokens)


@every_model_and_stage
def test_caches_are_as_long_as_what_is_left(row: Row, stages: tuple[int, ...]) -> None:
    model, inputs = model_of(row), row.inputs([1, 1, 1])  # of one length, so that nothing is padding
    keeps = chosen(inputs, row, stages)
    longest = [inputs["input_ids"].shape[1]] + [int(columns_kept(inputs, keep).sum(1).max()) for keep in keeps]
    assert longest == sorted({*longest}, reverse=True), "every stage must shorten the longest sample"
    read = 0 if stages[0] else longest[0] - longest[1]  # lengths count columns that no layer holds
    with stages_of(model, stages, Uneven()).installed():
        cache = cache_of(model(**inputs, use_cache=True))
    lengths = [cache.get_seq_length(layer) for layer in range(LAYERS)]
    assert lengths == [longest[sum(stage <= layer for stage in stages)] + read for layer in range(LAYERS)]


@every_schedule
def test_hidden_states_come_back_at_full_length_with_zeros_for_rows_that_are_gone(
    row: Row, stages: tuple[int, ...]
) -> None:
    model, inputs = model_of(row), row.inputs()
    keeps, stack = chosen(inputs, row, stages), stack_of(row, model)
    outputs: list[Any] = []
    hook = stack.register_forward_hook(lambda module, args, output: outputs.append(output))
    with stages_of(model, stages, Uneven()).installed():
        hook.remove()  # and after the one that hands the output back
        hook = stack.register_forward_hook(lambda module, args, output: outputs.append(output))
        model(**inputs, output_hidden_states=True)
    with masked(row, model, inputs, stages, keeps):
        model(**inputs, output_hidden_states=True)
    hook.remove()
    got, expected = outputs
    assert torch.equal(got.hidden_states[-1], got.last_hidden_state)
    begun = [sum(at < layer or at == 0 for at in stages) for layer in range(LAYERS + 1)]
    left = [[torch.ones_like(keeps[0]), *keeps][number] for number in begun]
    for ours, theirs, keep in zip(got.hidden_states, expected.hidden_states, left, strict=True):
        columns = columns_kept(inputs, keep)
        assert ours.shape == theirs.shape
        assert not ours[~columns].any()
        rows = columns & inputs["attention_mask"].bool()
        exact(ours[rows], theirs[rows], atol=row.tolerance() * scale(theirs))


@pytest.mark.slow
@every_schedule
def test_beams_and_sampling_find_what_the_masked_model_finds(row: Row, stages: tuple[int, ...]) -> None:
    model, inputs = model_of(row), row.inputs()
    with stages_of(model, stages, choose := Uneven()).installed():
        torch.manual_seed(3)
        tokens, steps = generate(row, model, inputs, **SAMPLED_BEAMS)
    keeps = chosen(inputs, row, stages)
    assert all(map(torch.equal, choose.keeps, keeps)), "the batch before beams are expanded"
    with masked(row, model, inputs, stages, keeps):
        torch.manual_seed(3)
        masked_tokens, masked_steps = generate(row, model, inputs, **SAMPLED_BEAMS)
    assert torch.equal(tokens, masked_tokens)
    exact(steps, masked_steps, atol=row.tolerance() * scale(steps))


@pytest.mark.slow
@every_schedule
@pytest.mark.usefixtures("what_a_family_lacks")
def test_attention_decides_the_same_for_beams_and_without_a_cache(row: Row, stages: tuple[int, ...]) -> None:
    # One image a sample: older versions of generate mix several up when they expand pixels for beams.
    model, inputs = model_of(row), row.inputs([0, 2])
    prefills = []
    for settings in ({}, {"num_beams": 3}, {"use_cache": False}):
        with stages_of(model, stages, choose := MostAttended(), observe=True).installed():
            tokens, steps = generate(row, model, inputs, **settings)
        prefills.append((choose.keeps, choose.seen, tokens, steps))
    (cached, seen, tokens, steps), (beams, beams_seen, *_), (uncached, uncached_seen, *again) = prefills
    count, runs = len(stages), 1 if row in (OPT, QUESTIONED) else STEPS  # BLIP-2's generate always has a cache
    assert len(cached) == len(beams) == count and len(uncached) == count * runs
    assert all(map(torch.equal, uncached, cached * runs)), "the choice belongs to the prompt"
    assert all(map(torch.equal, beams, cached))
    for one, other in zip([*uncached_seen, *beams_seen], seen * (runs + 1), strict=True):
        exact(one.attention, other.attention, atol=row.tolerance())
    assert torch.equal(again[0], tokens)
    exact(again[1], steps, atol=row.tolerance() * scale(steps))


@every_schedule
def test_generate_and_forward_observe_the_same_row(row: Row, stages: tuple[int, ...]) -> None:
    model, inputs = model_of(row), row.inputs([1])
    with stages_of(model, stages, choose := MostAttended(), observe=True).installed():
        model(**inputs)
        generate(row, model, inputs)
    for stage in (0, 1):
        exact(choose.seen[stage].attention, choose.seen[stage + 2].attention, atol=row.tolerance())


@every_schedule
def test_a_decoding_loop_by_hand_equals_generate(row: Row, stages: tuple[int, ...]) -> None:
    model, inputs = model_of(row), row.inputs()
    with stages_of(model, stages, Uneven()).installed():
        tokens, steps = generate(row, model, inputs)
        looped = torch.stack([*row.oracle.loop(model, inputs, tokens, with_positions=True)], 1)
    exact(looped, steps, atol=row.tolerance() * scale(steps))


@makes_positions
def test_a_decoding_loop_by_hand_without_position_ids_equals_the_masked_loop(row: Row) -> None:
    model, inputs, stages = model_of(row), row.inputs(), (1, 3)
    tokens = inputs["input_ids"][:, -STEPS:]
    with stages_of(model, stages, Uneven()).installed():
        looped = torch.stack([*row.oracle.loop(model, inputs, tokens, with_positions=False)], 1)
    with masked(row, model, inputs, stages, chosen(inputs, row, stages)):
        expected = torch.stack([*row.oracle.loop(model, inputs, tokens, with_positions=False)], 1)
    exact(looped, expected, atol=row.tolerance() * scale(expected))


@makes_positions
def test_a_cache_expanded_after_the_prefill_decodes_each_copy_alike(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    token = inputs["input_ids"][:, -1:]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
    decode, logits = model.get_submodule(row.oracle.stepper), []
    for copies in (1, 2):
        with stages_of(model, (1, 3), Uneven()).installed():
            cache = cache_of(model(**inputs, use_cache=True))
            cache.batch_repeat_interleave(copies)
            ids, more = of_rows(token, copies * len(token)), of_rows(mask, copies * len(mask))
            logits.append(decode(input_ids=ids, attention_mask=more, **{CACHE: cache}).logits[:, -1])
    exact(logits[1], of_rows(logits[0], 2 * len(token)), atol=row.tolerance() * scale(logits[0]))


@pytest.mark.slow
@every_schedule
def test_a_sample_does_not_depend_on_its_batch_or_padding(row: Row, stages: tuple[int, ...]) -> None:
    model, inputs = model_of(row), row.inputs()
    count = len(inputs["input_ids"])
    with stages_of(model, stages, first := MostAttended(), observe=True).installed():
        _, together = generate(row, model, inputs, 2)
    for rows, pads in [([sample], 0) for sample in range(count)] + [(list(range(count))[::-1], 4)]:
        part = row.inputs(rows, pads)
        with stages_of(model, stages, choose := MostAttended(), observe=True).installed():
            _, steps = generate(row, model, part, 2)
        exact(steps, together[rows], atol=row.tolerance() * scale(together))
        for one, other in zip(choose.seen, first.seen, strict=True):
            found = other.attention[rows, :, : one.attention.shape[2]]
            exact(one.attention, found, atol=row.tolerance())


@every_model_and_stage
def test_the_loss_leaves_out_labels_predicted_from_rows_gone_at_the_last_stage(
    row: Row, stages: tuple[int, ...]
) -> None:
    model, inputs = model_of(row), row.inputs()
    labels = row.oracle.labels(inputs)
    given, keeps = labels.clone(), chosen(inputs, row, stages)
    reported: list[int] = []
    decide = lambda prompt: Selection(choose(prompt))  # noqa: E731
    choose = Uneven()
    with PruneAtDecoderLayers(find_family(model), decide, SiteSettings(stages), reported.append).installed():
        loss = model(**inputs, labels=labels).loss
    left_out = row.oracle.left_out(inputs, labels, keeps[-1])
    assert left_out.any() and reported == [0, left_out.sum()]
    assert torch.equal(labels, given), "the caller's labels are not changed"
    unpruned = model(**inputs, labels=labels).loss
    with masked(row, model, inputs, stages, keeps):
        expected = model(**inputs, labels=labels.masked_fill(left_out, -100)).loss
    exact(loss, expected, atol=row.tolerance() * expected.item())
    assert abs(loss - unpruned) > 2e-4 * unpruned
