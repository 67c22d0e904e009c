"""What a model answered is heard at its own calls, and comparing changes neither the answers nor the model."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from catp_lightning import PruningError
from catp_lightning.models import find_family
from catp_lightning.pruning.answers import Answer, compare_with_unpruned, listening
from catp_lightning.pruning.pruner import applied
from tests.support.chats import ask, said
from tests.support.families import BY_NAME
from tests.support.footprints import footprint
from tests.support.matrix import EVERYTHING, uneven
from tests.support.models import GREEDY, random_blip2
from tests.support.oracles import CACHE
from tests.support.policies import HALF

pytestmark = pytest.mark.usefixtures("no_grad")


BEAMS = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}


@pytest.mark.parametrize("settings", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_same_is_whether_the_generated_ids_are_equal_up_to_their_end(settings: dict[str, Any]) -> None:
    model, inputs = random_blip2()
    model.language_projection.weight.data *= 0.02
    settings = {**settings, "min_new_tokens": 1}
    full = model.generate(**inputs, **settings)
    before = footprint(model)
    with applied(model, HALF) as pruner:
        alone = model.generate(**inputs, **settings)
        with compare_with_unpruned(pruner) as comparison:
            assert torch.equal(model.generate(**inputs, **settings), alone), "the caller gets the pruned answer"
    width = max(full.shape[1], alone.shape[1])
    pad = lambda ids: torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=1)  # noqa: E731
    expected = (pad(full) == pad(alone)).view(3, -1).all(1)
    assert len(comparison.same) == 1 and torch.equal(comparison.same[0], expected)
    assert footprint(model) == before


def test_a_forward_is_compared_at_the_last_prompt_row() -> None:
    model, inputs = random_blip2()
    full = model(**inputs).logits
    with applied(model, HALF) as pruner, compare_with_unpruned(pruner) as comparison:
        pruned = model(inputs["pixel_values"], inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        labels = inputs["input_ids"].masked_fill(torch.arange(18) < 15, -100)
        model(**inputs, labels=labels)
    assert torch.equal(comparison.same[0], full[:, -1].argmax(-1) == pruned[:, -1].argmax(-1))
    assert torch.equal(comparison.same[1], full[:, 14].argmax(-1) == pruned[:, 14].argmax(-1))


def test_a_cache_that_the_caller_hands_in_is_filled_by_the_pruned_run_alone() -> None:
    model, inputs = random_blip2()
    cache = DynamicCache(config=model.language_model.config)
    with applied(model, HALF) as pruner, compare_with_unpruned(pruner) as comparison:
        model(**inputs, **{CACHE: cache})
        assert [layer.keys.shape[2] for layer in cache.layers] == [10 + 4] * 3
        token = inputs["input_ids"][:, -1:]
        model.language_model(input_ids=token, **{CACHE: cache})
    assert len(comparison.same) == 1, "a decoding step is no answer of its own"


def test_answers_end_with_their_end_token() -> None:
    one = Answer(torch.tensor([[5, 2, 1]]), torch.tensor([[True, True, False]]), 1, torch.tensor([0]))
    longer = Answer(torch.tensor([[5, 2]]), torch.tensor([[True, True]]), 1, torch.tensor([0]))
    other = Answer(torch.tensor([[5, 1, 2]]), torch.tensor([[True, True, True]]), 1, torch.tensor([0]))
    assert one.same_as(longer).tolist() == [True] and one.same_as(other).tolist() == [False]


def test_a_generate_that_somebody_else_set_on_the_model_is_called_and_stays() -> None:
    model, inputs = random_blip2()
    calls, heard = [], []
    original = model.generate

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    model.generate = theirs  # type: ignore[method-assign]
    with listening(find_family(model), heard.append):
        model.generate(**inputs, **GREEDY)
    assert calls == [1] and len(heard) == 1 and heard[0].ids.shape == (3, 10)
    assert model.__dict__["generate"] is theirs


def test_a_generate_without_ids_is_refused_where_answers_are_compared() -> None:
    model, inputs = random_blip2()
    with applied(model, HALF) as pruner:
        model.generate(pixel_values=inputs["pixel_values"], max_new_tokens=3)
        assert pruner.record.keep.sum(1).tolist() == [4, 4, 4], "pruning itself works: BLIP-2 makes the ids"
        with compare_with_unpruned(pruner), pytest.raises(PruningError, match="without input_ids"):
            model.generate(pixel_values=inputs["pixel_values"], max_new_tokens=3, do_sample=False)


def test_a_turn_on_a_filled_cache_is_refused_where_answers_are_compared_or_recorded() -> None:
    row = BY_NAME["Llava"]
    model, inputs = row.model(), row.inputs([0])
    with applied(model, EVERYTHING, choose=uneven()) as pruner:
        first = ask(model, None, inputs, lambda text: nullcontext())
        with compare_with_unpruned(pruner), pytest.raises(PruningError, match="each time from its beginning"):
            ask(model, first, said([3], 5), lambda text: nullcontext())
    heard: list[Answer] = []
    first = ask(model, None, inputs, lambda text: nullcontext())
    with listening(find_family(model), heard.append), pytest.raises(PruningError, match="each time from its beginning"):
        ask(model, first, said([3], 5), lambda text: nullcontext())
    assert not heard
