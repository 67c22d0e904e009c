"""Caches of a schedule: several turns of text, copies, other prompts, and samples that lose nothing at first."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from catp_lightning import PruningError
from tests.support.chats import chat, said
from tests.support.matrix import STEPS, exact, generate, scale
from tests.support.oracles import CACHE, cache_of, of_rows
from tests.support.rows import Row
from tests.support.stages import (
    LLAMA,
    MISTRAL,
    OPT,
    QWEN,
    THREE,
    WINDOWED,
    Uneven,
    chosen,
    masked,
    model_of,
    schedules,
    stages_of,
)

pytestmark = pytest.mark.usefixtures("no_grad")
makes_positions = pytest.mark.parametrize("row", [LLAMA, OPT, WINDOWED[0]], ids=repr)


@schedules([LLAMA, QWEN, OPT, MISTRAL, *WINDOWED], [LLAMA, QWEN, WINDOWED[-1]])
@pytest.mark.usefixtures("what_a_family_lacks")
def test_text_turns_equal_the_same_chat_under_a_mask(row: Row, stages: tuple[int, ...]) -> None:
    model, inputs = model_of(row), row.inputs()
    count, keeps = len(inputs["input_ids"]), chosen(inputs, row, stages)
    turns = [inputs, said([4, 2, 3, 1][:count], 3), said([1, 5, 2, 4][:count], 4)]
    with stages_of(model, stages, Uneven()).installed():
        found = chat(row, model, turns, lambda text: nullcontext())
    other = chat(row, model, turns, lambda text: masked(row, model, inputs, stages, keeps))
    full = chat(row, model, turns, lambda text: nullcontext())
    for turn, expected in zip(found, other, strict=True):
        exact(turn.logits, expected.logits, atol=row.tolerance() * scale(expected.logits))
        assert torch.equal(turn.tokens, expected.tokens)
    assert scale(found[2].logits - full[2].logits) > 0.01 * scale(full[2].logits), "dropping must move the last turn"


@pytest.mark.slow
@pytest.mark.parametrize("row", [LLAMA, QWEN, WINDOWED[0]], ids=repr)
def test_a_longest_sample_that_loses_nothing_at_the_input_leaves_layer_0_as_long_as_the_prompt(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    keeps = chosen(inputs, row, THREE)
    longest = int(inputs["attention_mask"].sum(1).argmax())
    keeps[0][longest] = row.oracle.tokens(inputs)[longest]
    with stages_of(model, THREE, lambda prompt: keeps[prompt.stage]).installed():
        prefill = model(**inputs, use_cache=True)
        tokens, steps = generate(row, model, inputs, 10)
    with masked(row, model, inputs, THREE, keeps):
        oracle = model(**inputs).logits
        oracle_tokens, oracle_steps = generate(row, model, inputs, 10)
    assert not keeps[0][row.oracle.tokens(inputs)].all(), "others lose some"
    assert cache_of(prefill).layers[0].keys.shape[2] == min(inputs["input_ids"].shape[1], _window(prefill))
    rows, atol = row.oracle.compared(inputs, keeps[-1]), row.tolerance() * scale(oracle)
    exact(prefill.logits[rows], oracle[rows], atol=atol)
    exact(steps, oracle_steps, atol=atol)
    assert torch.equal(tokens, oracle_tokens)


def _window(prefill: Any) -> int:
    """Number of rows that the first layer's cache may hold: a window's, before the row that comes next."""
    layer = cache_of(prefill).layers[0]
    return layer.sliding_window - 1 if layer.is_sliding else 10**6


@makes_positions
def test_a_decoding_loop_by_hand_without_position_ids_equals_the_masked_loop(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    tokens = inputs["input_ids"][:, -STEPS:]

    def looped() -> Tensor:
        return torch.stack([*row.oracle.loop(model, inputs, tokens, with_positions=False)], 1)

    with stages_of(model, THREE, Uneven()).installed():
        found = looped()
    with masked(row, model, inputs, THREE, chosen(inputs, row, THREE)):
        expected = looped()
    exact(found, expected, atol=row.tolerance() * scale(expected))


@makes_positions
def test_a_cache_expanded_after_the_prefill_decodes_each_copy_alike(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    token = inputs["input_ids"][:, -1:]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
    decode, logits = model.get_submodule(row.oracle.stepper), []
    for copies in (1, 2):
        with stages_of(model, THREE, Uneven()).installed():
            cache = cache_of(model(**inputs, use_cache=True))
            cache.batch_repeat_interleave(copies)
            ids, more = of_rows(token, copies * len(token)), of_rows(mask, copies * len(mask))
            logits.append(decode(input_ids=ids, attention_mask=more, **{CACHE: cache}).logits[:, -1])
    exact(logits[1], of_rows(logits[0], 2 * len(token)), atol=row.tolerance() * scale(logits[0]))


@makes_positions
def test_caches_of_other_prompts_and_of_unpruned_models_are_refused(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    token, decode = inputs["input_ids"][:, -1:], model.get_submodule(row.oracle.stepper)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
    plain = cache_of(model(**inputs, use_cache=True))
    with stages_of(model, THREE, Uneven()).installed():
        first, second = (cache_of(model(**inputs, use_cache=True)) for _ in range(2))
        for cache in (plain, first):
            with pytest.raises(PruningError, match="not filled by the last pruned prompt"):
                decode(input_ids=token, attention_mask=mask, **{CACHE: cache})
        decode(input_ids=token, attention_mask=mask, **{CACHE: second})
    with pytest.raises(Exception, match=r"prun|Prun"):  # whose columns no layer holds
        decode(input_ids=token, attention_mask=mask, **{CACHE: second})
