"""The matrix: what every family refuses, and which positions and caches it knows."""

import copy

import pytest
import torch

from catp_lightning import PruningError, PruningPolicy, prune
from tests.support.encoder_oracles import EncoderDecoder
from tests.support.families import BY_NAME, ROWS
from tests.support.footprints import footprint
from tests.support.matrix import (
    EVERYTHING,
    STEPS,
    cases,
    every,
    every_row,
    exact,
    generate,
    rows_where,
    scale,
    settled,
    uneven,
)
from tests.support.oracles import CACHE, cache_of
from tests.support.rows import Row

pytestmark = pytest.mark.usefixtures("no_grad", "what_a_family_lacks")
COMPACT = PruningPolicy(positions="compact")


@pytest.mark.slow
@rows_where(lambda row: not row.coordinates)
def test_compact_positions_equal_a_prompt_physically_shortened(row: Row) -> None:
    model, inputs = row.model(), row.inputs()
    with prune(model, COMPACT, choose=uneven()) as pruning:
        tokens, steps = generate(row, model, inputs, 2)
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


WHOLE = [pytest.param(BY_NAME[name], True, id=f"{name}, kept whole") for name in ("Llava", "Blip2-T5", "Mllama")]


@pytest.mark.parametrize(("row", "whole"), [*cases(every, False), *WHOLE])
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


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in ("Llava", "Blip2-OPT", "InternVL")], ids=repr)
def test_a_copy_of_a_pruned_cache_is_known_and_one_of_text_goes_on_after_another_prompt(row: Row) -> None:
    model, inputs = row.model(), row.inputs()
    stepper = row.model().language_model if row.name == "Blip2-OPT" else row.model()
    token, text = torch.full((len(inputs["input_ids"]), 1), 5), torch.full((2, 6), 5)
    with prune(model, EVERYTHING, choose=uneven()):
        of_text = cache_of(stepper(input_ids=text, use_cache=True))
        output = model(**inputs, use_cache=True)
        copied = copy.deepcopy(cache_of(output))
        stepper(input_ids=text[:, :1], **{CACHE: of_text})  # its prompt was not the last
        stepper(input_ids=text, use_cache=True)
        with pytest.raises(PruningError, match="not filled by the last pruned prompt"):
            stepper(input_ids=token, **{CACHE: copied})


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in ("Blip2-OPT", "InstructBlip")], ids=repr)
def test_the_ids_of_a_call_that_was_refused_serve_no_other(row: Row) -> None:
    model, inputs = settled(row), row.inputs()
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with prune(model, EVERYTHING, choose=uneven()):
        with pytest.raises(PruningError, match="static cache"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
        with pytest.raises(PruningError, match="inputs_embeds"):
            model(**{**inputs, "input_ids": None}, inputs_embeds=embeddings)
