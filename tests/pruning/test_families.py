"""The matrix: every family holds every invariant of docs/design.md. What a family lacks is said in its row."""

import pytest
import torch

from catp_lightning import PruningError, PruningPolicy, prune
from tests.support.caches import words
from tests.support.decoder_oracle import Decoder
from tests.support.families import BY_NAME
from tests.support.footprints import footprint
from tests.support.matrix import (
    EVERYTHING,
    SAMPLED_BEAMS,
    PlantedError,
    chosen,
    every_row,
    every_type,
    exact,
    fail,
    generate,
    scale,
    settled,
    uneven,
)
from tests.support.oracles import columns_kept
from tests.support.rows import Row

pytestmark = pytest.mark.usefixtures("no_grad", "what_a_family_lacks")


@every_row
def test_keep_one_gives_the_logits_and_text_of_the_unpruned_model(row: Row) -> None:
    model, inputs = row.model(), row.inputs()
    forward = row.oracle.forward_inputs(inputs)
    full, (text, steps) = model(**forward).logits, generate(row, model, inputs)
    for keep in (1.0, 1000):
        # An int is a budget of tokens that some scorer has to fill; this one needs to see nothing.
        with prune(model, PruningPolicy(scorer="position", keep=keep)) as pruning:
            logits = model(**forward).logits
            new, new_steps = generate(row, model, inputs) if keep == 1000 else (text, steps)
        assert torch.equal(pruning.keep, row.oracle.tokens(inputs))
        rows = row.oracle.compared(inputs, pruning.keep)
        exact(logits[rows], full[rows], atol=1e-10 * scale(full))
        exact(new_steps, steps, atol=1e-10 * scale(full))
        assert torch.equal(new, text)


@every_type
def test_dropping_equals_masking_in_prefill_and_four_decoding_steps(
    row: Row, dtype: torch.dtype, attention: str | None
) -> None:
    model, inputs = row.model(dtype, attention), row.inputs(dtype=dtype)
    forward = row.oracle.forward_inputs(inputs)
    full = model(**forward).logits
    with prune(model, EVERYTHING, choose=uneven()) as pruning:
        prefill = model(**forward).logits
        tokens, steps = generate(row, model, inputs)
    keep = chosen(row, inputs)
    assert torch.equal(pruning.keep, keep)
    assert len(set(keep.sum(1).tolist())) == len(keep), "samples keep different numbers"
    with row.oracle.masked(model, inputs, keep):
        masked = model(**forward).logits
        masked_tokens, masked_steps = generate(row, model, inputs)
    rows, atol = row.oracle.compared(inputs, keep), row.tolerance(dtype, attention) * scale(full)
    assert scale(masked[rows] - full[rows]) > 0.1 * scale(full), "dropping must move logits, or this proves nothing"
    exact(prefill[rows], masked[rows], atol=atol)
    exact(steps, masked_steps, atol=atol)
    assert torch.equal(tokens, masked_tokens)
    if isinstance(row.oracle, Decoder):
        assert not prefill[~columns_kept(inputs, keep)].any(), "rows that were dropped have no output"


@every_row
def test_the_cache_holds_only_what_was_kept(row: Row) -> None:
    model, inputs = row.model(), row.inputs()
    forward = {**row.oracle.forward_inputs(inputs), "use_cache": True}
    full = row.oracle.cached(model(**forward))
    with prune(model, EVERYTHING, choose=uneven()) as pruning:
        held = row.oracle.cached(model(**forward))
    assert held == row.oracle.stored(inputs, pruning.keep)
    assert held < full or held == pruning.keep.shape[1]


@every_row
def test_a_sample_does_not_depend_on_its_batch_or_padding(row: Row) -> None:
    everyone = list(range(len(row.samples())))
    model, inputs = row.model(), row.inputs(everyone)
    with prune(model, EVERYTHING, choose=uneven()) as pruning:
        _, together = generate(row, model, inputs, 2)
    keep, atol = pruning.keep, row.tolerance(moved=True) * scale(together)
    for rows, pads in [*(([one], 0) for one in everyone), (everyone[::-1], 4)]:
        with prune(model, EVERYTHING, choose=uneven(rows)) as pruning:
            _, steps = generate(row, model, row.inputs(rows, pads), 2)
        if pruning.keep is not None:  # a sample without an image has nothing to choose from
            assert torch.equal(pruning.keep, keep[rows, : pruning.keep.shape[1]])
        exact(steps, together[rows], atol=atol)


@every_row
def test_decoding_without_a_cache_equals_cached_decoding(row: Row) -> None:
    model, inputs = row.model(), row.inputs()
    with prune(model, EVERYTHING, choose=uneven()) as pruning:
        tokens, steps = generate(row, model, inputs)
        keep = pruning.keep
        again, uncached = generate(row, model, inputs, use_cache=False)
        assert torch.equal(pruning.keep, keep), "the choice belongs to the prompt"
    assert torch.equal(again, tokens)
    exact(uncached, steps, atol=row.tolerance() * scale(steps))


@every_row
def test_a_loop_by_hand_without_a_cache_equals_generate(row: Row) -> None:
    model, inputs = row.model(), row.inputs()
    with prune(model, EVERYTHING, choose=uneven()) as pruning:
        tokens, steps = generate(row, model, inputs)
        keep = pruning.keep
        for step in (1, 3):
            grown = row.oracle.grow(inputs, tokens[:, :step])
            positions = row.oracle.positions(grown["attention_mask"])
            logits = model(**grown, **positions, use_cache=False).logits[:, -1]
            exact(logits, steps[:, step], atol=row.tolerance(moved=True) * scale(steps))
            assert torch.equal(pruning.keep, keep), "the choice belongs to the prompt"


@every_row
def test_a_loop_by_hand_without_cache_or_position_ids_equals_the_masked_loop(row: Row) -> None:
    model, inputs = row.model(), row.inputs()
    grown, keep = row.oracle.grow(inputs, words(inputs)), chosen(row, inputs)
    with prune(model, EVERYTHING, choose=uneven()) as pruning:
        logits = model(**grown, use_cache=False).logits[:, -1]
    with row.oracle.masked(model, grown, keep):
        masked = model(**grown, use_cache=False).logits[:, -1]
    assert torch.equal(pruning.keep, keep)
    exact(logits, masked, atol=row.tolerance() * scale(masked))


@every_row
def test_beams_and_sampling_find_what_the_masked_model_finds(row: Row) -> None:
    model, inputs = row.model(), row.inputs()
    keep = chosen(row, inputs)
    with prune(model, EVERYTHING, choose=uneven()) as pruning:
        torch.manual_seed(3)
        tokens, steps = generate(row, model, inputs, **SAMPLED_BEAMS)
    assert torch.equal(pruning.keep, keep), "the batch before beams are expanded"
    with row.oracle.masked(model, inputs, keep):
        torch.manual_seed(3)
        masked_tokens, masked_steps = generate(row, model, inputs, **SAMPLED_BEAMS)
    assert torch.equal(tokens, masked_tokens)
    exact(steps, masked_steps, atol=row.tolerance() * scale(steps))  # of every beam, those that lost included


@every_row
def test_a_decoding_loop_by_hand_equals_generate(row: Row) -> None:
    model, inputs = row.model(), row.inputs()
    with prune(model, EVERYTHING, choose=uneven()):
        tokens, steps = generate(row, model, inputs)
        looped = torch.stack([*row.oracle.loop(model, inputs, tokens, with_positions=True)], 1)
    exact(looped, steps, atol=row.tolerance(moved=True) * scale(steps))


@every_row
def test_a_decoding_loop_by_hand_without_position_ids_equals_the_masked_loop(row: Row) -> None:
    """Without position ids a model counts columns, padding included: as far apart from generate as unpruned."""
    model, inputs = row.model(), row.inputs()
    with prune(model, EVERYTHING, choose=uneven()):
        looped = torch.stack([*row.oracle.loop(model, inputs, words(inputs), with_positions=False)], 1)
    with row.oracle.masked(model, inputs, chosen(row, inputs)):
        masked = torch.stack([*row.oracle.loop(model, inputs, words(inputs), with_positions=False)], 1)
    exact(looped, masked, atol=row.tolerance() * scale(masked))


@every_row
def test_the_loss_is_the_masked_runs_without_labels_predicted_from_dropped_rows(row: Row) -> None:
    model, inputs = row.model(), row.inputs()
    labels = row.oracle.labels(inputs)
    given, keep = labels.clone(), chosen(row, inputs)
    with prune(model, EVERYTHING, choose=uneven()) as pruning:
        loss = model(**inputs, labels=labels).loss
        left_out = row.oracle.left_out(inputs, labels, keep)
        assert pruning.labels_left_out == left_out.sum()
    assert torch.equal(labels, given), "the caller's labels are not changed"
    if isinstance(row.oracle, Decoder):
        assert left_out.any(), "some labels must be predicted from dropped rows, or this proves nothing"
    unpruned = model(**inputs, labels=labels).loss
    with row.oracle.masked(model, inputs, keep):
        masked = model(**inputs, labels=labels.masked_fill(left_out, -100)).loss
    exact(loss, masked, atol=row.tolerance() * masked.item())
    assert abs(loss - unpruned) > 1e-4 * unpruned


@every_row
def test_the_model_is_what_it_was_after_return_and_after_exceptions(row: Row) -> None:
    model, inputs = settled(row), row.oracle.forward_inputs(row.inputs())
    before, full = footprint(model), model(**inputs).logits
    with prune(model, EVERYTHING, choose=uneven()):
        assert footprint(model) != before
        pruned = model(**inputs).logits
        with pytest.raises(PruningError, match="does not nest"), prune(model, EVERYTHING):
            pass
    assert footprint(model) == before
    with pytest.raises(PlantedError), prune(model, EVERYTHING, choose=fail):
        model(**inputs)
    assert footprint(model) == before
    hook = row.oracle.inside(model).register_forward_hook(fail)
    with prune(model, EVERYTHING, choose=uneven()):
        with pytest.raises(PlantedError):
            generate(row, model, row.inputs())
        hook.remove()
        assert torch.equal(model(**inputs).logits, pruned), "the next call is pruned like the first"
    assert footprint(model) == before
    assert torch.equal(model(**inputs).logits, full)


@pytest.mark.parametrize(
    "pair", [("Llava", "LlavaNext"), ("Blip2-OPT", "Blip2-T5"), ("Mllama", "Qwen2.5-VL"), ("Gemma3", "Idefics3")]
)
def test_two_models_are_pruned_at_once_without_meeting(pair: tuple[str, str]) -> None:
    rows = [BY_NAME[name] for name in pair]
    models, inputs = [row.model() for row in rows], [row.oracle.forward_inputs(row.inputs()) for row in rows]
    alone, keeps = [], []
    for model, given in zip(models, inputs, strict=True):
        with prune(model, EVERYTHING, choose=uneven()) as pruning:
            alone.append(model(**given).logits)
            keeps.append(pruning.keep)
    with prune(models[0], EVERYTHING, choose=uneven()) as one, prune(models[1], EVERYTHING, choose=uneven()) as two:
        for turn in (1, 0):
            assert torch.equal(models[turn](**inputs[turn]).logits, alone[turn])
    assert torch.equal(one.keep, keeps[0]) and torch.equal(two.keep, keeps[1])


@every_row
def test_bfloat16_is_finite(row: Row) -> None:
    model, inputs = row.model(torch.bfloat16), row.inputs(dtype=torch.bfloat16)
    with prune(model, EVERYTHING, choose=uneven()) as pruning:
        _, steps = generate(row, model, inputs, 2)
    assert steps.isfinite().all()
    assert torch.equal(pruning.keep, chosen(row, inputs))
