"""Dropping inside a decoder whose layers slide: windows are counted in original columns, whatever a cache holds."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.support.matrix import exact, scale
from tests.support.newer_families import NEWER
from tests.support.oracles import CACHE, cache_of, columns_kept
from tests.support.rows import Row
from tests.support.stages import WINDOWED, Uneven, chosen, deep, every_stage, masked, model_of, stages_of

pytestmark = pytest.mark.usefixtures("no_grad")
SLIDING = [
    *(row for row in WINDOWED if row.name != "PaliGemma"),
    *(pytest.param(deep(row), marks=pytest.mark.slow) for row in NEWER if row.name == "EXAONE-4.5, sliding windows"),
]
every_window = pytest.mark.parametrize("row", SLIDING, ids=repr)
WINDOW, COUNT = 12, 16  # so many tokens are generated that all images leave every window


def generated(row: Row, attention: str | None = None, **settings: Any) -> Any:
    """What `generate` returns of a model, as it is in the running context."""
    model, inputs = model_of(row, torch.float32, attention), row.inputs(dtype=torch.float32)
    length = {"max_new_tokens": COUNT, "min_new_tokens": COUNT, "do_sample": False, "suppress_tokens": [110, 112, 113]}
    return model.generate(**inputs, **length, **settings, return_dict_in_generate=True, output_logits=True)


@pytest.mark.slow
@every_window
@every_stage
@pytest.mark.parametrize("sliding", [True, False], ids=["window", "whole"])
def test_answers_longer_than_a_window_are_those_of_the_masked_model_whatever_the_caches_hold(
    row: Row, stages: tuple[int, ...], sliding: bool
) -> None:
    model, inputs = model_of(row, torch.float32), row.inputs(dtype=torch.float32)
    keeps = chosen(inputs, row, stages)

    def cache() -> dict[str, DynamicCache]:
        return {} if sliding else {CACHE: DynamicCache()}

    with stages_of(model, stages, Uneven()).installed():
        found = generated(row, **cache())
    with masked(row, model, inputs, stages, keeps):
        expected = generated(row, **cache())
    assert {layer.is_sliding for layer in cache_of(found).layers} >= {sliding}
    ours, theirs = torch.stack(found.logits, 1), torch.stack(expected.logits, 1)
    exact(ours, theirs, atol=2e-5 * scale(theirs))
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.slow
@every_window
@every_stage
def test_attention_maps_of_every_step_are_those_of_the_masked_model(row: Row, stages: tuple[int, ...]) -> None:
    model, inputs = model_of(row, torch.float32, "eager"), row.inputs(dtype=torch.float32)
    keeps, length = chosen(inputs, row, stages), inputs["input_ids"].shape[1]
    with stages_of(model, stages, Uneven()).installed():
        found = generated(row, "eager", output_attentions=True).attentions
    with masked(row, model, inputs, stages, keeps):
        expected = generated(row, "eager", output_attentions=True).attentions
    narrow = 0
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for layer, (own, other) in enumerate(zip(ours, theirs, strict=True)):
            assert own.shape == other.shape
            narrow += step > 0 and own.shape[3] == WINDOW
            rows = torch.ones(own.shape[::2], dtype=torch.bool) if step else read(inputs, keeps, stages, layer)
            exact(own.transpose(1, 2)[rows], other.transpose(1, 2)[rows], atol=1e-5)
    assert narrow > COUNT and length > WINDOW


def read(inputs: dict[str, Tensor], keeps: list[Tensor], stages: tuple[int, ...], layer: int) -> Tensor:
    """Rows of the prompt that a layer reads and that are no padding, bool [B, L]."""
    begun, real = sum(stage <= layer for stage in stages), inputs["attention_mask"].bool()
    return real & columns_kept(inputs, keeps[begun - 1]) if begun else real


@every_window
def test_several_rows_at_once_are_decoded_as_by_the_masked_model(row: Row) -> None:
    """Text of a later call that is longer than one token: each of its rows has a window of its own."""
    model, inputs, stages = model_of(row), row.inputs([1, 2]), (1, 3)
    more = torch.arange(3, 3 + 2 * 15).view(2, 15)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)

    def turns() -> Tensor:
        cache = cache_of(model(**inputs, use_cache=True))
        found = []
        for part in (more[:, :5], more[:, 5:6], more[:, 6:]):
            seen = mask[:, : cache.get_seq_length() + part.shape[1]]
            found.append(model(input_ids=part, attention_mask=seen, **{CACHE: cache}, use_cache=True).logits)
        return torch.cat(found, 1)

    with stages_of(model, stages, Uneven([1, 2])).installed():
        ours = turns()
    with masked(row, model, inputs, stages, chosen(inputs, row, stages, [1, 2])):
        theirs = turns()
    exact(ours, theirs, atol=row.tolerance() * scale(theirs))


@every_window
def test_rows_of_a_cache_that_trade_places_keep_their_windows(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    count = len(inputs["input_ids"])
    token, order = torch.full((count, 1), 7), torch.arange(count).flip(0)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
    logits = []
    with stages_of(model, (1, 3), Uneven()).installed():
        for traded in (False, True):
            cache = cache_of(model(**inputs, use_cache=True))
            if traded:
                cache.reorder_cache(order)
            seen = mask[order] if traded else mask
            logits.append(model(input_ids=token, attention_mask=seen, **{CACHE: cache}, use_cache=True).logits)
    exact(logits[1], logits[0][order], atol=row.tolerance() * scale(logits[0]))
