"""What a pruned prompt left in a cache is decoded right, or refused, wherever it goes."""

import copy
import logging
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast

from catp_lightning import PruningError, PruningPolicy, prune
from catp_lightning.prompt.caches import Opened, cache_in, seal
from catp_lightning.pruning.answers import compare_with_unpruned
from catp_lightning.pruning.pruner import applied
from tests.support.caches import FEW, INSIDE, WHOLE, every_place, kept_by, loop, words
from tests.support.decoder_oracle import Decoder
from tests.support.families import BY_NAME, OLDEST
from tests.support.matrix import EVERYTHING, cases, exact, rows_where, scale, uneven
from tests.support.oracles import CACHE, Inputs, cache_of
from tests.support.rows import Row

pytestmark = pytest.mark.usefixtures("no_grad")


def is_looped(row: Row) -> bool:
    return "a_decoding_loop_by_hand_equals_generate" not in row.lacks


@pytest.mark.parametrize(
    ("row", "policy"),
    [*cases(is_looped, EVERYTHING), *((BY_NAME[name], INSIDE) for name in ("Llava", "InternVL"))],
)
def test_a_cache_is_refused_once_its_context_is_left(row: Row, policy: PruningPolicy) -> None:
    model, inputs = row.model(), row.inputs()
    with prune(model, policy, **kept_by(policy)):
        steps = loop(row, model, inputs)
        next(steps), next(steps)
    with pytest.raises(PruningError, match="holds a pruned prompt"):
        next(steps)
    for other in (WHOLE, FEW):
        with prune(model, policy, **kept_by(policy)):
            steps = loop(row, model, inputs)
            next(steps)
        with prune(model, other), pytest.raises(PruningError, match=r"^This cache|^These encoder states"):
            next(steps)


@rows_where(lambda row: is_looped(row) and row.name != "Mllama")
def test_a_cache_of_which_nothing_was_dropped_goes_on_anywhere(row: Row) -> None:
    """But not Llama-3.2-Vision's, in which rows that no text sees are not stored even so."""
    model, inputs = row.model(), row.inputs()
    expected = torch.stack([*loop(row, model, inputs)], 1)
    for policy, later in ((WHOLE, nullcontext()), (WHOLE.with_keep(1000), prune(model, FEW))):
        with prune(model, policy):
            steps = loop(row, model, inputs)
            found = [next(steps)]
        with later:
            found += [*steps]
        exact(torch.stack(found, 1), expected, atol=1e-9 * scale(expected))


def decoded(row: Row, model: PreTrainedModel, inputs: Inputs, change: Callable[[Any], Any]) -> Iterator[Tensor]:
    """The logits [B, V] of one more token after a prompt, whose cache is changed between; first nothing."""
    output = model(**row.oracle.forward_inputs(inputs), use_cache=True)
    cache = change(cache_of(output))
    yield torch.zeros(0)
    token, mask = words(inputs)[:, :1], inputs["attention_mask"]
    given: dict[str, Any] = {"input_ids": token, "attention_mask": torch.cat([mask, torch.ones_like(token)], 1)}
    stepper = model
    if isinstance(row.oracle, Decoder):
        stepper = model.get_submodule(row.oracle.stepper)
    elif row.name == "Mllama":
        sees = inputs["cross_attention_mask"]
        given["cross_attention_mask"] = torch.cat([sees, sees[:, -1:]], 1)
    else:
        encoded = output.language_model_outputs.encoder_last_hidden_state
        stepper, given = model.language_model, {"attention_mask": mask, "decoder_input_ids": token}
        given["encoder_outputs"] = (encoded,)
    yield stepper(**given, **{CACHE: cache}).logits[:, -1]


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "copy": copy.copy,
}


@every_place
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_copies_of_a_pruned_cache_are_refused_too(
    row: Row, policy: PruningPolicy, copied: Callable[[Any], Any]
) -> None:
    model, inputs = row.model(), row.inputs()
    with prune(model, policy, **kept_by(policy)):
        steps = decoded(row, model, inputs, copied)
        next(steps)
    with pytest.raises(PruningError, match="holds a pruned prompt"):
        next(steps)


def cut(cache: Any) -> Any:
    own = getattr(cache, "self_attention_cache", cache)
    if not any(layer.is_sliding for layer in own.layers):  # those cannot be cut
        own.crop(-2)
    return cache


def repeated(cache: Any) -> Any:
    cache.batch_repeat_interleave(2)
    return cache


@pytest.mark.parametrize("change", [cut, repeated], ids=["cropped", "repeated"])
@every_place
def test_a_cache_that_was_changed_is_refused_outside(
    row: Row, policy: PruningPolicy, change: Callable[[Any], Any]
) -> None:
    model, inputs = row.model(), row.inputs()
    with prune(model, policy, **kept_by(policy)):
        cache = cache_of(model(**row.oracle.forward_inputs(inputs), use_cache=True))
        cache = change(cache)
        own = getattr(cache, "self_attention_cache", cache)
        states = torch.zeros_like(own.layers[0].keys[:, :, :1])
    if own.get_seq_length() > 0:
        with pytest.raises(PruningError, match="holds a pruned prompt"):
            own.update(states, states, 0)


@every_place
def test_rows_that_trade_places_between_the_steps_are_decoded_as_themselves(row: Row, policy: PruningPolicy) -> None:
    """A beam search of one's own, or a loop that puts finished samples aside."""
    model, inputs = row.model(), row.inputs()
    order = torch.arange(len(inputs["input_ids"])).flip(0)

    def traded(cache: Any) -> Any:
        cache.reorder_cache(order)
        return cache

    other = {name: value[order] if len(value) == len(order) else value for name, value in inputs.items()}
    with prune(model, policy, **kept_by(policy)):
        _, expected = decoded(row, model, inputs, lambda cache: cache)
        steps = decoded(row, model, inputs, traded)
        next(steps)
        found = next(moved(steps, inputs, other, order))
    exact(found, expected[order], atol=1e-9 * scale(expected))


def moved(steps: Iterator[Tensor], inputs: Inputs, other: Inputs, order: Tensor) -> Iterator[Tensor]:
    """From here on the caller's own tensors are those of the rows in their new order, as the cache is."""
    for name in ("attention_mask", "cross_attention_mask"):
        if name in inputs:
            inputs[name] = other[name]
    yield next(steps)


@every_place
def test_a_second_turn_on_the_first_turns_cache_answers_as_reading_anew_or_is_refused(
    row: Row, policy: PruningPolicy
) -> None:
    model, inputs = row.model(), row.inputs([0])
    settings: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    if not isinstance(row.oracle, Decoder) or row.name.startswith("Blip2"):
        pytest.skip("generate of this model takes no cache, or the text of a second turn")
    more = torch.tensor([[31, 32, 33, 34]])
    keep = row.oracle.tokens(inputs)
    keep = keep & (torch.arange(keep.shape[1]) % 3 == 0)
    with prune(model, policy, choose=lambda visual: keep):
        first = model.generate(**inputs, **settings, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, more], 1)
        longer: Inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "token_type_ids" in inputs:
            longer["token_type_ids"] = torch.nn.functional.pad(
                inputs["token_type_ids"], (0, ids.shape[1] - inputs["input_ids"].shape[1])
            )
        pixels = {name: value for name, value in inputs.items() if name not in longer}
        expected = model.generate(**longer, **pixels, **settings)
        again = model.generate(**inputs, **settings, return_dict_in_generate=True)  # the last prompt there
        assert torch.equal(model.generate(**longer, **{CACHE: cache_of(again)}, **settings), expected)


def test_encoder_states_are_looked_at_anywhere_and_decoded_only_where_they_were_made() -> None:
    row = BY_NAME["Blip2-T5"]
    model, inputs = row.model(), row.inputs()
    given = {"attention_mask": inputs["attention_mask"], "decoder_input_ids": words(inputs)}
    with applied(model, EVERYTHING, choose=uneven()) as pruner:
        states = model(**row.oracle.forward_inputs(inputs)).language_model_outputs.encoder_last_hidden_state
        expected = model.language_model(encoder_outputs=(states,), **given).logits
        with pytest.raises(PruningError, match="encoder states were not"):
            model.language_model(encoder_outputs=(states.clone(),), **given)
        with pruner.suspended(), pytest.raises(PruningError, match="encoder states were not"):
            model.language_model(encoder_outputs=(states,), **given)
    for later in (nullcontext, lambda: prune(model, WHOLE), lambda: prune(model, FEW)):
        for handed_on in (states, states.to(torch.float64), states.flip(0)):
            with later(), pytest.raises(PruningError, match="encoder states were not"):
                model.language_model(encoder_outputs=(handed_on,), **given)
            with later(), pytest.raises(PruningError, match="encoder states were not"):
                model.language_model.generate(encoder_outputs=BaseModelOutput(handed_on), num_beams=2, **given)
    probe = nn.Linear(states.shape[-1], 3).double()
    plain = torch.tensor(states.tolist(), dtype=torch.float64)
    exact(probe(states), probe(plain), atol=1e-12)
    assert type(copy.deepcopy(states)) is type(pickle.loads(pickle.dumps(states))) is Tensor
    assert expected.isfinite().all()


def test_an_empty_cache_that_is_given_to_generate_is_filled_and_decoded() -> None:
    row = BY_NAME["Llava"]
    model, inputs = row.model(), row.inputs()
    with prune(model, EVERYTHING, choose=uneven()):
        expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        found = model.generate(**inputs, max_new_tokens=4, do_sample=False, **{CACHE: DynamicCache()})
    assert torch.equal(found, expected)


@pytest.mark.skipif(OLDEST, reason="reset of transformers 5.13 makes a cache zeros, and leaves it as long as it was")
def test_a_cache_emptied_after_a_call_that_failed_serves_another() -> None:
    row = BY_NAME["Llava"]
    model, inputs = row.model(), row.inputs()
    cache = DynamicCache(config=model.config.get_text_config())
    layer = model.model.language_model.layers[1]
    with prune(model, EVERYTHING, choose=uneven()):
        expected = model(**inputs).logits

        def stop(*args: object) -> None:
            raise RuntimeError("planted")

        hook = layer.register_forward_pre_hook(stop)
        with pytest.raises(RuntimeError, match="planted"):
            model(**inputs, **{CACHE: cache})
        hook.remove()
    with pytest.raises(PruningError, match="holds a pruned prompt"):
        model(input_ids=words(inputs)[:, :1], **{CACHE: cache})
    cache.reset()
    with prune(model, EVERYTHING, choose=uneven()):
        assert torch.equal(model(**inputs, **{CACHE: cache}).logits, expected)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # transformers 5.24 prefers cache, and takes both
@pytest.mark.parametrize("name", [*dict.fromkeys(("past_key_values", CACHE))])
@pytest.mark.parametrize("policy", [EVERYTHING, INSIDE], ids=lambda policy: policy.scorer)
def test_a_cache_is_decoded_or_refused_under_each_name_that_transformers_takes(
    name: str, policy: PruningPolicy
) -> None:
    row = BY_NAME["Llava"]
    model, inputs = row.model(), row.inputs([0])
    step = {
        "input_ids": words(inputs)[:, :1],
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),
    }
    with applied(model, policy, **kept_by(policy)) as pruner:
        expected = model(**step, **{CACHE: cache_of(model(**inputs, use_cache=True))}).logits
        cache = cache_of(model(**inputs, use_cache=True))
        found = model(**step, **{name: cache})
        assert torch.equal(found.logits, expected) and cache_of(found) is cache
        assert cache.layers[-1].keys.shape[2] < step["attention_mask"].shape[1], "not shortened"
        with compare_with_unpruned(pruner), pytest.raises(PruningError, match="was given a filled cache"):
            model.generate(**inputs, **{name: cache}, max_new_tokens=2)
    with pytest.raises(PruningError, match="holds a pruned prompt"):
        model(**step, **{name: cache})


def test_an_output_without_a_cache_is_asked_for_it_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]  # of transformers: once for each message
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        assert cache_in(BaseModelOutputWithPast(last_hidden_state=torch.zeros(1))) is None
    finally:
        library.removeHandler(caplog.handler)
    assert not caplog.records


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_stays_sealed_while_the_original_is_added_to(copied: Callable[[DynamicCache], DynamicCache]) -> None:
    """Layers of one cache are opened and closed together, those of its copy are not among them."""
    cache, opened = DynamicCache(), Opened()
    keys = torch.ones(1, 2, 3, 4, dtype=torch.float32, device="cpu")
    for layer in range(3):
        cache.update(keys, keys, layer)
    seal(cache, torch.zeros(1, dtype=torch.int64, device="cpu"), missing=5)
    other = copied(cache)
    assert cache.get_seq_length() == other.get_seq_length() == 8
    opened.open(cache)
    for layer in range(3):
        assert cache.get_seq_length(layer) == 3  # as many as there are, which the new rows are added to
        cache.update(keys, keys, layer)
        with pytest.raises(PruningError, match="holds a pruned prompt"):
            other.update(keys, keys, layer)
    opened.close()
    assert (cache.get_seq_length(), other.get_seq_length()) == (11, 8)
    with pytest.raises(PruningError, match="holds a pruned prompt"):
        cache.update(keys, keys, 2)
