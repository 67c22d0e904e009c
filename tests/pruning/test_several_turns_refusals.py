"""What is refused in a chat on a pruned cache, and what goes on after a turn was taken back or has failed."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from catp_lightning import PruningError, prune
from tests.support.chats import TEXT, ask, joined, said
from tests.support.families import BY_NAME
from tests.support.matrix import EVERYTHING, PlantedError, chosen, exact, fail, scale, uneven
from tests.support.oracles import CACHE, Inputs

pytestmark = pytest.mark.usefixtures("no_grad")


def plainly(text: Inputs) -> Any:
    return nullcontext()


@pytest.mark.parametrize("name", ["Llava", "Qwen2.5-VL", "Mllama"])
def test_the_cache_of_a_second_turn_is_refused_outside_and_in_another_context(name: str) -> None:
    row = BY_NAME[name]
    model, inputs = row.model(), row.inputs([0])
    with prune(model, EVERYTHING, choose=uneven()):
        second = ask(model, ask(model, None, inputs, plainly), said([4], 3), plainly)
    with pytest.raises(PruningError, match="holds a pruned prompt"):
        ask(model, second, said([2], 4), plainly)
    with prune(model, EVERYTHING, choose=uneven()), pytest.raises(PruningError, match=r"^This cache"):
        ask(model, second, said([2], 4), plainly)


def test_a_new_image_is_refused_where_generate_reads_all_images_again() -> None:
    row = BY_NAME["Blip2-OPT"]
    model, inputs = row.model(), row.inputs([0])
    with prune(model, EVERYTHING, choose=uneven()):
        first = ask(model, None, inputs, plainly)
        both = {**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)}
        with pytest.raises(PruningError, match="reads the images of the whole text again at every turn"):
            ask(model, first, both, plainly)


def test_a_second_image_of_llama_is_refused_on_a_cache_that_holds_one() -> None:
    row = BY_NAME["Mllama"]
    model, inputs = row.model(), row.inputs([0])
    with prune(model, EVERYTHING, choose=uneven()):
        first = ask(model, None, inputs, plainly)
        with pytest.raises(PruningError, match="holds image rows already"):
            ask(model, first, inputs, plainly)


def test_an_image_that_the_model_gives_the_positions_of_text_is_refused() -> None:
    row = BY_NAME["Qwen2.5-VL"]
    model, inputs = row.model(), row.inputs([0])
    with prune(model, EVERYTHING, choose=uneven()):
        first = ask(model, None, inputs, plainly)
        mask = joined(first.inputs, inputs)["attention_mask"][:, :-1]
        given = {**inputs, "attention_mask": mask, CACHE: first.cache}
        with pytest.raises(PruningError, match="Pass position_ids of the new columns"):
            model(**given)


def test_images_that_generate_reads_in_parts_are_refused() -> None:
    row = BY_NAME["Llava"]
    model, inputs = row.model(), row.inputs([1])  # each of its two images is in a part of its own
    with prune(model, EVERYTHING, choose=uneven()), pytest.raises(PruningError, match="Leave prefill_chunk_size out"):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=14)


@pytest.mark.parametrize("count", [2, 4], ids=["of the answer", "of the question too"])
@pytest.mark.parametrize("name", ["Llava", "Qwen2.5-VL"])
def test_text_that_is_taken_back_is_forgotten_but_not_an_image(name: str, count: int) -> None:
    """As chats do to answer again, or another question."""
    row = BY_NAME[name]
    model, inputs = row.model(), row.inputs()
    keep, more = chosen(row, inputs), said([3] * len(inputs["input_ids"]), 3)

    def again(hidden: Any, back: int = count) -> Any:
        first = ask(model, None, inputs, hidden)
        first.cache.crop(-back)
        text = {name: first.inputs[name][:, : -back - 1] for name in TEXT if name in first.inputs}
        return ask(model, replace(first, inputs=text), more, hidden).logits

    with prune(model, EVERYTHING, choose=uneven()):
        found = again(plainly)
        with pytest.raises(PruningError, match="or was changed since"):
            again(plainly, 14)
    masked = again(lambda text: row.oracle.masked(model, inputs, keep))
    exact(found, masked, atol=row.tolerance() * scale(masked))


def test_a_turn_that_failed_leaves_a_cache_that_is_refused_and_a_model_that_works() -> None:
    row = BY_NAME["Llava"]
    model, inputs = row.model(), row.inputs([0])
    with prune(model, EVERYTHING, choose=uneven()):
        expected = ask(model, None, inputs, plainly)
        first = ask(model, None, inputs, plainly)
        hook = row.oracle.inside(model).register_forward_hook(fail)
        with pytest.raises(PlantedError):
            ask(model, first, inputs, plainly)
        hook.remove()
        with pytest.raises(PruningError, match="or was changed since"):
            ask(model, first, said([2], 4), plainly)
        assert torch.equal(ask(model, None, inputs, plainly).logits, expected.logits)
