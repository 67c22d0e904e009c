"""Decoders in which layers with a recurrent state and attention take turns: what dropping means, and caches."""

import sys
from contextlib import nullcontext
from copy import deepcopy
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from catp_lightning import PruningError, PruningPolicy, prune
from catp_lightning.models import find_family
from tests.support.families import OLDEST
from tests.support.hybrid_families import HYBRID
from tests.support.matrix import EVERYTHING, exact, generate, scale, uneven
from tests.support.oracles import CACHE, cache_of
from tests.support.rows import Row

pytestmark = pytest.mark.usefixtures("no_grad")
hybrids = pytest.mark.parametrize("row", HYBRID, ids=repr)


class InFloat64(ModuleType):
    """torch, in which float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers compute the gated delta rule in float64, where it asks for float32."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    for row in HYBRID:
        for layer in row.model().modules():
            module = sys.modules[type(layer).__module__]
            if module.__name__.startswith("transformers.models.qwen3_5"):
                monkeypatch.setattr(module, "torch", InFloat64("torch"))


def apart(tokens: Tensor) -> Tensor:
    """A choice that keeps one token of the first sample, all but one of the second, and two of others."""
    kept = torch.full((len(tokens), 1), 2)
    kept[:2, 0] = torch.stack([torch.tensor(1), tokens[1].sum() - 1])
    return (torch.arange(tokens.shape[1]).flip(0) % tokens.sum(1, keepdim=True) < kept) & tokens


@pytest.mark.usefixtures("in_float64")
@hybrids
def test_dropping_equals_the_model_run_on_the_shorter_sequence_at_the_same_positions(row: Row) -> None:
    model, inputs = row.model(), row.inputs([2, 2, 0])  # two of one length, so that what fills one up is no padding
    with prune(model, EVERYTHING, choose=apart) as pruning:
        prefill = model(**inputs).logits
        tokens, steps = generate(row, model, inputs)
    keep = apart(row.oracle.tokens(inputs))
    assert torch.equal(pruning.keep, keep) and keep.sum(1).unique().numel() == len(keep)
    with row.oracle.masked(model, inputs, keep):
        short = model(**inputs).logits
        short_tokens, short_steps = generate(row, model, inputs)
    rows = row.oracle.compared(inputs, keep)
    exact(prefill[rows], short[rows], atol=1e-10 * scale(short))
    exact(steps, short_steps, atol=1e-10 * scale(short))
    assert torch.equal(tokens, short_tokens)


def states(cache: Any) -> list[Tensor]:
    """All tensors of a cache: keys, values, states of convolutions and recurrent ones."""
    found: list[Tensor] = []
    for layer in cache.layers:
        for value in vars(layer).values():
            found += [
                part for part in (value.values() if isinstance(value, dict) else [value]) if torch.is_tensor(part)
            ]
    return found


@hybrids
def test_outside_of_its_context_the_cache_of_a_pruned_prompt_is_refused_before_any_state_changes(row: Row) -> None:
    model, inputs = row.model(), row.inputs()
    with prune(model, EVERYTHING, choose=uneven()):
        cache = cache_of(model(**inputs, use_cache=True))
    for held in (cache, deepcopy(cache)):
        before = [tensor.clone() for tensor in states(held)]
        with pytest.raises(PruningError, match="holds a pruned prompt"):
            model(input_ids=inputs["input_ids"][:, -1:], **{CACHE: held}, use_cache=True)
        assert len(before) > 2 * len(cache.layers) - 2
        assert all(torch.equal(*pair) for pair in zip(states(held), before, strict=True))
    if OLDEST:
        return  # in transformers 5.13 a cache that is reset keeps its length
    cache.reset()
    del inputs["attention_mask"]
    assert model(**inputs, **{CACHE: cache}).logits.isfinite().all(), "emptied, it may hold another prompt"


@hybrids
def test_inside_the_decoder_nothing_can_be_dropped(row: Row) -> None:
    policy = PruningPolicy("visual-exit", {"layer": 2}, keep=0.5)
    with pytest.raises(PruningError, match="layers with a recurrent state"), prune(row.model(), policy):
        pytest.fail("entered")
    assert find_family(row.model()).depth > 2


@pytest.mark.usefixtures("in_float64")
@hybrids
def test_a_second_turn_on_the_cache_equals_reading_all_of_it_at_once(row: Row) -> None:
    if OLDEST and row.name == "LFM2-VL":
        pytest.skip("transformers 5.13 convolves one new column at a time, and reads several wrongly, unpruned as well")
    model, inputs = row.model(), row.inputs([1])
    types = inputs.pop("mm_token_type_ids", None)
    settings: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "output_logits": True}

    def answered(ids: Tensor, **more: Any) -> Any:
        own = {} if types is None else {"mm_token_type_ids": pad(types, (0, ids.shape[1] - types.shape[1]))}
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **settings, **own, **more)

    images = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    with prune(model, PruningPolicy("l2-norm", keep=0.4)) as pruning:
        first = answered(inputs["input_ids"], **images)
        ids = torch.cat([first.sequences, torch.tensor([[11, 12, 13, 14]])], 1)
        second = torch.stack(answered(ids, **{CACHE: cache_of(first)}).logits, 1)
        prefills = pruning.prefills
        anew = torch.stack(answered(ids, **images).logits, 1)
    assert prefills == 1 and pruning.prefills == 2
    exact(second, anew, atol=1e-10 * scale(anew))


def test_images_on_a_cache_of_which_samples_keep_different_numbers_are_refused() -> None:
    row = next(row for row in HYBRID if row.name == "LFM2-VL")
    model, inputs = row.model(), row.inputs([2, 2])
    text = torch.tensor([[5, 6, 7], [8, 9, 10]])
    mask = torch.cat([torch.ones_like(text), inputs.pop("attention_mask")], 1)
    for choice, refused in ((uneven(), True), (lambda tokens: tokens & (tokens.cumsum(1) <= 2), False)):
        with prune(model, EVERYTHING, choose=choice):
            cache = cache_of(model(input_ids=text, use_cache=True))
            raises = (
                pytest.raises(PruningError, match="Give each sample a call of its own") if refused else nullcontext()
            )
            with raises:
                model(**inputs, attention_mask=mask, **{CACHE: cache})
