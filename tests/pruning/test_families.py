"""The matrix: every family holds every invariant of docs/design.md. What a family lacks is said in its row."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch

from catp_lightning import PruningError, PruningPolicy, prune
from tests.support.families import ROWS, Row
from tests.support.footprints import footprint
from tests.support.matrix import (
    BEAMS,
    EVERYTHING,
    SAMPLED,
    SEVERAL,
    STEPS,
    PlantedError,
    chosen,
    every_row,
    every_type,
    exact,
    fail,
    generate,
    rows_where,
    scale,
    settled,
    uneven,
)
from tests.support.oracles import Decoder, EncoderDecoder, columns_kept

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(autouse=True)
def _what_a_family_lacks(request: pytest.FixtureRequest) -> None:
    """A reason that no longer holds fails the test."""
    row = request.node.callspec.params.get("row")
    reason = row and row.lacks.get(request.node.originalname.removeprefix("test_"))
    if reason:
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))


@every_row
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
def test_keep_one_gives_the_logits_and_text_of_the_unpruned_model(row: Row, dtype: torch.dtype, bound: float) -> None:
    model, inputs = row.model(dtype), row.inputs(dtype=dtype)
    forward = row.oracle.forward_inputs(inputs)
    full, (text, steps) = model(**forward).logits, generate(row, model, inputs)
    if isinstance(row.oracle, Decoder):
        bound = 1e-6 if dtype is torch.float32 else bound
    for keep in (1.0, 1000):
        # An int is a budget of tokens that some scorer has to fill; this one needs to see nothing.
        with prune(model, PruningPolicy(scorer="position", keep=keep)) as pruning:
            logits = model(**forward).logits
            new, new_steps = generate(row, model, inputs)
        assert torch.equal(pruning.keep, row.oracle.tokens(inputs))
        rows = row.oracle.compared(inputs, pruning.keep)
        exact(logits[rows], full[rows], atol=bound * scale(full))
        exact(new_steps, steps, atol=bound * scale(full))
        assert torch.equal(new, text)


@every_type
@pytest.mark.parametrize(
    ("dtype", "attention"), [(torch.float32, None), (torch.float64, None), (torch.float32, "eager")], ids=str
)
def test_dropping_equals_masking_in_prefill_and_six_decoding_steps(
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
        _, together = generate(row, model, inputs)
    keep, atol = pruning.keep, row.tolerance(moved=True) * scale(together)
    for rows, pads in [*(([one], 0) for one in everyone), (everyone[:2], 0), (everyone[::-1], 4)]:
        part = row.inputs(rows, pads)
        with prune(model, EVERYTHING, choose=uneven(rows)) as pruning:
            _, steps = generate(row, model, part)
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
        for step in (0, 1, 3):
            grown = row.oracle.grow(inputs, tokens[:, :step])
            positions = row.oracle.positions(grown["attention_mask"])
            logits = model(**grown, **positions, use_cache=False).logits[:, -1]
            exact(logits, steps[:, step], atol=row.tolerance(moved=True) * scale(steps))
            assert torch.equal(pruning.keep, keep), "the choice belongs to the prompt"


@every_row
def test_a_loop_by_hand_without_cache_or_position_ids_equals_the_masked_loop(row: Row) -> None:
    model, inputs = row.model(), row.inputs()
    keep, words = chosen(row, inputs), torch.tensor([[17, 33, 5]]).expand(len(inputs["input_ids"]), -1)
    for step in (1, 3):
        grown = row.oracle.grow(inputs, words[:, :step])
        with prune(model, EVERYTHING, choose=uneven()) as pruning:
            logits = model(**grown, use_cache=False).logits[:, -1]
        with row.oracle.masked(model, grown, keep):
            masked = model(**grown, use_cache=False).logits[:, -1]
        assert torch.equal(pruning.keep, keep)
        exact(logits, masked, atol=row.tolerance() * scale(masked))


@every_row
@pytest.mark.parametrize("settings", [BEAMS, SEVERAL, SAMPLED], ids=["beams", "sequences", "sampling"])
def test_beams_and_sampling_find_what_the_masked_model_finds(row: Row, settings: dict[str, Any]) -> None:
    model, inputs = row.model(), row.inputs()
    keep = chosen(row, inputs)
    with prune(model, EVERYTHING, choose=uneven()) as pruning:
        torch.manual_seed(3)
        tokens, steps = generate(row, model, inputs, **settings)
    assert torch.equal(pruning.keep, keep), "the batch before beams are expanded"
    with row.oracle.masked(model, inputs, keep):
        torch.manual_seed(3)
        masked_tokens, masked_steps = generate(row, model, inputs, **settings)
    assert torch.equal(tokens, masked_tokens)
    exact(steps, masked_steps, atol=row.tolerance() * scale(steps))  # of every beam, those that lost included


@every_row
def test_a_decoding_loop_by_hand_equals_generate(row: Row) -> None:
    check_loop(row, with_positions=True)


@every_row
def test_a_decoding_loop_by_hand_without_position_ids_equals_the_masked_loop(row: Row) -> None:
    check_loop(row, with_positions=False)


def check_loop(row: Row, with_positions: bool) -> None:
    """Without position ids a model counts columns, padding included: as far apart from generate as unpruned."""
    model, inputs = row.model(), row.inputs()
    with prune(model, EVERYTHING, choose=uneven()) as pruning:
        tokens, steps = generate(row, model, inputs)
        looped = torch.stack([*row.oracle.loop(model, inputs, tokens, with_positions)], 1)
    with row.oracle.masked(model, inputs, pruning.keep):
        masked = torch.stack([*row.oracle.loop(model, inputs, tokens, with_positions)], 1)
    exact(looped, masked, atol=row.tolerance() * scale(steps))
    if with_positions:
        exact(looped, steps, atol=row.tolerance(moved=True) * scale(steps))


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


@pytest.mark.parametrize("pair", list(pairwise([*ROWS, ROWS[0]])), ids=lambda pair: f"{pair[0]} and {pair[1]}")
def test_two_models_are_pruned_at_once_without_meeting(pair: tuple[Row, Row]) -> None:
    models = [row.model() for row in pair]
    inputs = [row.oracle.forward_inputs(row.inputs()) for row in pair]
    alone, keeps = [], []
    for model, given in zip(models, inputs, strict=True):
        with prune(model, EVERYTHING, choose=uneven()) as pruning:
            alone.append(model(**given).logits)
            keeps.append(pruning.keep)
    with prune(models[0], EVERYTHING, choose=uneven()) as one, prune(models[1], EVERYTHING, choose=uneven()) as two:
        for turn in (1, 0, 0, 1):
            assert torch.equal(models[turn](**inputs[turn]).logits, alone[turn])
    assert torch.equal(one.keep, keeps[0]) and torch.equal(two.keep, keeps[1])


@every_row
def test_bfloat16_is_finite(row: Row) -> None:
    model, inputs = row.model(torch.bfloat16), row.inputs(dtype=torch.bfloat16)
    with prune(model, EVERYTHING, choose=uneven()) as pruning:
        assert model(**row.oracle.forward_inputs(inputs)).logits.isfinite().all()
        _, steps = generate(row, model, inputs)
    assert steps.isfinite().all()
    assert torch.equal(pruning.keep, chosen(row, inputs))


COMPACT = PruningPolicy(positions="compact")


@rows_where(lambda row: not row.coordinates)
def test_compact_positions_equal_a_prompt_physically_shortened(row: Row) -> None:
    model, inputs = row.model(), row.inputs()
    with prune(model, COMPACT, choose=uneven()) as pruning:
        tokens, steps = generate(row, model, inputs)
    for sample in range(len(tokens)):
        alone, answer = row.inputs([sample]), tokens[sample : sample + 1]
        keep = pruning.keep[sample : sample + 1]
        short = row.oracle.compact(model, alone, answer, keep[:, : row.oracle.tokens(alone).shape[1]])
        exact(steps[sample], short, atol=row.tolerance(moved=True) * scale(steps))


@rows_where(lambda row: row.coordinates)
def test_positions_with_coordinates_cannot_be_compact(row: Row) -> None:
    model, inputs = settled(row), row.inputs()
    before = footprint(model)
    with pytest.raises(PruningError, match="compact"), prune(model, COMPACT, choose=uneven()):
        model(**inputs)
    assert footprint(model) == before


@every_row
def test_a_static_cache_is_refused_where_it_would_hold_visual_tokens(row: Row) -> None:
    model, inputs = settled(row), row.inputs()
    before = footprint(model)
    with prune(model, EVERYTHING, choose=uneven()):
        if isinstance(row.oracle, EncoderDecoder):
            _, steps = generate(row, model, inputs)
            _, static = generate(row, model, inputs, cache_implementation="static")
            exact(static, steps, atol=row.tolerance() * scale(steps))
        else:
            with pytest.raises(PruningError, match="static cache"):
                generate(row, model, inputs, cache_implementation="static")
    assert footprint(model) == before


@every_row
def test_embeddings_without_ids_are_refused(row: Row) -> None:
    model, inputs = settled(row), row.oracle.forward_inputs(row.inputs())
    before, embeddings = footprint(model), model.get_input_embeddings()(inputs["input_ids"])
    inputs["input_ids"] = None
    with prune(model, EVERYTHING, choose=uneven()), pytest.raises(PruningError, match="inputs_embeds"):
        model(**inputs, inputs_embeds=embeddings)
    assert footprint(model) == before


@every_row
@pytest.mark.parametrize("whole", [False, True], ids=["that was pruned", "that kept everything"])
def test_a_cache_of_another_prompt_than_the_last_is_refused(row: Row, whole: bool) -> None:
    model, inputs = settled(row), row.inputs()
    other = row.inputs(range(len(inputs["input_ids"]))[::-1])
    tokens, choices = inputs["input_ids"][:, -STEPS:], [uneven(), (lambda seen: seen) if whole else uneven()]
    before = footprint(model)
    with prune(model, EVERYTHING, choose=lambda seen: choices.pop(0)(seen)):  # noqa: PLW0108 - one each call
        first = row.oracle.loop(model, inputs, tokens, with_positions=row.coordinates)
        next(first)
        next(row.oracle.loop(model, other, tokens, with_positions=row.coordinates))
        with pytest.raises(PruningError, match="not filled by the last pruned prompt"):
            next(first)
    assert footprint(model) == before


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in ("Llava", "InternVL", "Mistral3")], ids=repr)
def test_an_image_that_comes_with_a_cache_of_text_is_refused(row: Row) -> None:
    model, inputs = settled(row), row.inputs()
    text = torch.full_like(inputs["input_ids"], 5)
    cache = model(input_ids=text, use_cache=True).past_key_values
    mask = torch.cat([torch.ones_like(text), inputs["attention_mask"]], 1)
    before = footprint(model)
    with prune(model, EVERYTHING, choose=uneven()), pytest.raises(PruningError, match="An image came with a cache"):
        model(**{**inputs, "attention_mask": mask}, past_key_values=cache)
    assert footprint(model) == before


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in ("Llava", "Blip2-OPT", "InternVL")], ids=repr)
def test_a_copy_of_a_pruned_cache_is_known_and_one_of_text_goes_on_after_another_prompt(row: Row) -> None:
    model, inputs = row.model(), row.inputs()
    stepper = row.model().language_model if row.name == "Blip2-OPT" else row.model()
    token, text = torch.full((len(inputs["input_ids"]), 1), 5), torch.full((2, 6), 5)
    with prune(model, EVERYTHING, choose=uneven()):
        of_text = stepper(input_ids=text, use_cache=True).past_key_values
        output = model(**inputs, use_cache=True)
        copied = copy.deepcopy(getattr(output, "language_model_outputs", output).past_key_values)
        stepper(input_ids=text[:, :1], past_key_values=of_text)  # its prompt was not the last
        stepper(input_ids=text, use_cache=True)
        with pytest.raises(PruningError, match="not filled by the last pruned prompt"):
            stepper(input_ids=token, past_key_values=copied)


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in ("Blip2-OPT", "InstructBlip")], ids=repr)
def test_the_ids_of_a_call_that_was_refused_serve_no_other(row: Row) -> None:
    model, inputs = settled(row), row.inputs()
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with prune(model, EVERYTHING, choose=uneven()):
        with pytest.raises(PruningError, match="static cache"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
        with pytest.raises(PruningError, match="inputs_embeds"):
            model(**{**inputs, "input_ids": None}, inputs_embeds=embeddings)
