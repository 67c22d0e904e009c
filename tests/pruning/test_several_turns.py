"""A chat that hands each turn's cache to the next equals the same chat under a mask, with new images too."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from catp_lightning import PruningPolicy, prune
from tests.support.chats import TEXT, Turn, ask, both, chat, coordinates, held, joined, said
from tests.support.encoder_oracles import CrossAttention, EncoderDecoder
from tests.support.families import BY_NAME
from tests.support.matrix import EVERYTHING, chosen, exact, rows_where, scale, uneven
from tests.support.oracles import CACHE, Inputs, cache_of, columns_kept
from tests.support.quick import quick
from tests.support.recurrent_oracle import Recurrent
from tests.support.rows import Row

pytestmark = pytest.mark.usefixtures("no_grad")
lacking = pytest.mark.usefixtures("what_a_family_lacks")

Choice = Callable[[Tensor], Tensor]
UNEVEN = uneven()
FIRST, SECOND = [0, 1], [1, 0]  # samples whose images come in the first turn and in the second
IN_DECODER = (
    "Llava",
    "Qwen2.5-VL",
    "Qwen3-VL",
    "LlavaNext",
    "Gemma3",
    "PaliGemma",
    "Mistral3, sliding window",
    "SmolVLM",
)
QUICK = {"Llava", "Qwen2.5-VL", "Gemma3", "PaliGemma"}
reading_images = pytest.mark.parametrize("row", quick([BY_NAME[name] for name in IN_DECODER], QUICK))


def few(tokens: Tensor) -> Tensor:
    """Keep other tokens than `uneven` does: every third of each sample, from its second one on."""
    return tokens & (torch.arange(tokens.shape[1]) % 3 == 1)


def whole(tokens: Tensor) -> Tensor:
    return tokens


def each(*choices: Choice) -> Choice:
    """Return a choice that is the first of `choices` for the first prefill, and so on."""
    left = iter(choices)
    return lambda tokens: next(left)(tokens)  # noqa: PLW0108 - one each call


def plainly(text: Inputs) -> Any:
    return nullcontext()


def replies(count: int) -> list[Inputs]:
    """Return what is said in the second turn and in the third."""
    return [said([4, 2, 3, 1][:count], 3), said([1, 5, 2, 4][:count], 4)]


@pytest.mark.slow
@lacking
@rows_where(lambda row: not isinstance(row.oracle, EncoderDecoder | Recurrent))  # test_hybrids has those
def test_text_turns_equal_the_same_chat_under_a_mask(row: Row) -> None:
    model, inputs = row.model(), row.inputs()
    turns, keep = [inputs, *replies(len(inputs["input_ids"]))], chosen(row, inputs)
    with prune(model, EVERYTHING, choose=each(uneven())) as pruning:
        found = chat(row, model, turns, plainly)
    masked = chat(row, model, turns, lambda text: row.oracle.masked(model, inputs, keep))
    full = chat(row, model, turns, plainly)
    assert torch.equal(pruning.keep, keep) and pruning.prefills == 1
    for turn, other in zip(found, masked, strict=True):
        exact(turn.logits, other.logits, atol=row.tolerance() * scale(other.logits))
        assert torch.equal(turn.tokens, other.tokens)
    assert scale(found[2].logits - full[2].logits) > 0.1 * scale(full[2].logits), "dropping must move the last turn"
    read = found[2].inputs["input_ids"].shape[1] - 1  # the last token was not read
    assert found[2].cache.get_seq_length() == read
    later = 0 if isinstance(row.oracle, CrossAttention) else read - inputs["input_ids"].shape[1]
    stored = row.oracle.stored(inputs, keep)
    assert held(row, found[2]) == stored + later
    assert stored + later < held(row, full[2]) or stored == keep.shape[1]


class Pictured:
    """A chat with an image in each of its first two turns, and then one of text."""

    def __init__(self, row: Row, first: Choice = UNEVEN, second: Choice = few, **kind: Any) -> None:
        self.row, self.model, self.choices = row, row.model(**kind), (first, second)
        dtype = self.model.dtype
        self.turns = [row.inputs(FIRST, dtype=dtype), row.inputs(SECOND, dtype=dtype)]
        self.keeps = [choose(row.oracle.tokens(turn)) for choose, turn in zip(self.choices, self.turns, strict=True)]

    def keep(self, count: int) -> Tensor:
        tokens = [self.row.oracle.tokens(turn) for turn in self.turns]
        return both(tokens[:count], self.keeps[:count])

    def hidden(self, text: Inputs) -> Any:
        count = 1 if text["input_ids"].shape[1] == self.turns[0]["input_ids"].shape[1] else 2
        return self.row.oracle.masked(self.model, text, self.keep(count))

    def new(self, first: Turn) -> Inputs:
        """Return what the second turn is given beside the cache."""
        if not self.row.coordinates:
            return self.turns[1]
        text = joined(first.inputs, self.turns[1])
        own = coordinates(self.row, self.model, text, (FIRST, self.turns[0]), (SECOND, self.turns[1]))
        return {**self.turns[1], "position_ids": own}

    def forward(self, hidden: Any, **settings: Any) -> Any:
        """Return the output of a call of the model on the last token of the first turn and on the second turn."""
        first = ask(self.model, None, self.turns[0], hidden)
        text, past = joined(first.inputs, self.turns[1]), first.inputs["input_ids"].shape[1] - 1
        given = {name: value if name == "attention_mask" else value[:, past:] for name, value in text.items()}
        more = {name: value[..., past:] if name == "position_ids" else value for name, value in self.new(first).items()}
        rest = {name: value for name, value in more.items() if name not in TEXT}
        with hidden(text):
            return self.model(**given, **rest, **{CACHE: first.cache}, **settings)

    def talk(self, hidden: Any) -> list[Turn]:
        first = ask(self.model, None, self.turns[0], hidden)
        second = ask(self.model, first, self.new(first), hidden)
        return [first, second, ask(self.model, second, said([2, 4], 6), hidden)]


CHOICES = {"both pruned": (uneven(), few), "the second pruned": (whole, few), "the first pruned": (uneven(), whole)}


@lacking
@pytest.mark.parametrize(
    ("row", "choices"),
    [
        pytest.param(
            BY_NAME[name],
            choices,
            id=f"{name}, {which}",
            marks=() if name == "Llava" or which == "both pruned" else pytest.mark.slow,
        )
        for name in IN_DECODER
        for which, choices in CHOICES.items()
    ],
)
def test_an_image_in_the_second_turn_is_pruned_on_top_of_the_cache(row: Row, choices: tuple[Choice, Choice]) -> None:
    talk = Pictured(row, *choices)
    with prune(talk.model, EVERYTHING, choose=each(*choices)) as pruning:
        found = talk.talk(plainly)
    masked, full = talk.talk(talk.hidden), talk.talk(plainly)
    assert torch.equal(pruning.keep, talk.keeps[1]), "the record is of the image that came last"
    assert pruning.prefills == 2
    for turn, other in zip(found, masked, strict=True):
        exact(turn.logits, other.logits, atol=row.tolerance() * scale(other.logits))
        assert torch.equal(turn.tokens, other.tokens)
    for turn, other in zip(found[1:], full[1:], strict=True):
        assert scale(turn.logits - other.logits) > 0.1 * scale(other.logits), "dropping must move both turns"
    read, (first, second) = found[2].inputs["input_ids"].shape[1] - 1, talk.turns
    length = first["input_ids"].shape[1]
    stored = length if choices[0] is whole else row.oracle.stored(first, talk.keeps[0])
    stored += int(columns_kept(second, talk.keeps[1]).sum(1).max())  # its padding is not on the left of the chat
    assert held(row, found[2]) == stored + read - length - second["input_ids"].shape[1]


@lacking
@reading_images
def test_a_forward_call_with_an_image_on_a_pruned_cache_equals_the_masked_one(row: Row) -> None:
    """All of its rows, those of dropped columns being zero."""
    talk = Pictured(row)
    with prune(talk.model, EVERYTHING, choose=each(*talk.choices)):
        logits = talk.forward(plainly).logits
    masked = talk.forward(talk.hidden).logits
    columns = columns_kept(talk.turns[1], talk.keeps[1])
    assert not logits[:, 1:][~columns].any()
    seen = columns & talk.turns[1]["attention_mask"].bool()
    exact(logits[:, 1:][seen], masked[:, 1:][seen], atol=row.tolerance() * scale(masked))


@reading_images
def test_an_image_after_text_that_was_read_without_one_is_pruned(row: Row) -> None:
    """A text read first, by the plain model or inside the context: a system prompt, for example."""
    model, inputs = row.model(), row.inputs([0])
    types = dict.fromkeys(("token_type_ids", "mm_token_type_ids"), torch.zeros(1, 5, dtype=torch.long))
    intro = {name: value for name, value in {**said([5], 8), **types}.items() if name in inputs}
    read = joined(intro, inputs)
    keep = chosen(row, inputs)
    text: Inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
    if row.coordinates:
        text["position_ids"] = coordinates(row, model, read, ([0], inputs))[..., 5:]

    def answer(cache: Any) -> Tensor:
        return model(**text, attention_mask=read["attention_mask"], **{CACHE: cache}).logits[:, -1]

    cache = cache_of(model(**intro, use_cache=True))
    with row.oracle.masked(model, read, keep):
        masked = answer(cache)
    before = cache_of(model(**intro, use_cache=True))
    with prune(model, EVERYTHING, choose=uneven()):
        exact(answer(before), masked, atol=row.tolerance() * scale(masked))
        within = cache_of(model(**intro, use_cache=True))
        exact(answer(within), masked, atol=row.tolerance() * scale(masked))


def test_text_before_the_first_image_of_llama_is_read_from_the_cache() -> None:
    row = BY_NAME["Mllama"]
    model, inputs = row.model(), row.inputs()
    intro = said([5] * len(inputs["input_ids"]), 8)
    mask, sees = inputs["attention_mask"], inputs["cross_attention_mask"]
    given = {
        **inputs,
        "attention_mask": torch.cat([intro["attention_mask"], mask], 1),
        "cross_attention_mask": torch.cat([torch.zeros_like(sees[:, :5]), sees], 1),
    }

    def answer() -> Tensor:
        cache = cache_of(model(**intro, use_cache=True))
        return model(**given, **{CACHE: cache}).logits[:, -1]

    with prune(model, EVERYTHING, choose=each(whole, uneven())):
        found = answer()
    with row.oracle.masked(model, joined(intro, inputs), chosen(row, inputs)):
        masked = answer()
    exact(found, masked, atol=row.tolerance() * scale(masked))


@pytest.mark.parametrize("scorer", ["fastervlm", "cdpruner", "stride"])
def test_a_scorer_sees_the_image_and_the_question_of_the_turn_they_come_in(scorer: str) -> None:
    """What it chooses is what it chooses where that turn is all there is."""
    row, policy = BY_NAME["Llava"], PruningPolicy(scorer, keep=3)
    talk = Pictured(row)
    with prune(talk.model, policy) as alone:
        talk.model(**talk.turns[1])
    with prune(talk.model, policy) as pruning:
        found = talk.talk(plainly)
    assert torch.equal(pruning.keep, alone.keep)
    assert pruning.last is not None and torch.equal(pruning.last.counts, talk.turns[1]["input_ids"].eq(110).sum(1))
    assert found[2].logits.isfinite().all()


def test_compact_positions_of_a_chat_are_those_of_the_text_read_at_once() -> None:
    talk = Pictured(BY_NAME["Llava"])
    policy = PruningPolicy(positions="compact")
    with prune(talk.model, policy, choose=each(*talk.choices)):
        found = talk.talk(plainly)
    with prune(talk.model, EVERYTHING, choose=each(*talk.choices)):
        original = talk.talk(plainly)
    samples = talk.row.samples()
    pixels = torch.stack([image.tensors["pixel_values"] for own in zip(FIRST, SECOND, strict=True) for i in own
                          for image in samples[i].images])  # fmt: skip
    for turn in found[1:]:
        text = {name: value[:, : -turn.tokens.shape[1]] for name, value in turn.inputs.items()}
        with prune(talk.model, policy, choose=lambda tokens: talk.keep(2)):
            anew = ask(talk.model, None, {**text, "pixel_values": pixels}, plainly)
        exact(turn.logits, anew.logits, atol=talk.row.tolerance() * scale(anew.logits))
    assert scale(found[1].logits - original[1].logits) > 0.1 * scale(original[1].logits)


@pytest.mark.parametrize("name", ["Llava", "Qwen2.5-VL"])
def test_attention_maps_and_hidden_states_of_a_turn_are_of_all_columns(name: str) -> None:
    row = BY_NAME[name]
    talk = Pictured(row, dtype=torch.float32, attention="eager")
    with prune(talk.model, EVERYTHING, choose=each(*talk.choices)):
        found = talk.forward(plainly, output_attentions=True, output_hidden_states=True)
    masked = talk.forward(talk.hidden, output_attentions=True, output_hidden_states=True)
    stays = columns_kept(talk.turns[1], talk.keeps[1])
    rows, atol = stays & talk.turns[1]["attention_mask"].bool(), row.tolerance(torch.float32)
    for paid, other in zip(found.attentions, masked.attentions, strict=True):
        assert paid.shape == other.shape
        own, expected = paid[:, :, 1:].transpose(1, 2), other[:, :, 1:].transpose(1, 2)
        assert not own[~stays].any()
        exact(own[rows], expected[rows], atol=atol)
    for states, other in zip(found.hidden_states, masked.hidden_states, strict=True):
        exact(states[:, 1:][rows], other[:, 1:][rows], atol=atol * scale(other))


def test_a_chat_goes_on_with_some_of_its_samples_in_another_order_or_several_times() -> None:
    row = BY_NAME["Llava"]
    model, inputs = row.model(), row.inputs()
    order, keep = torch.tensor([2, 0, 0]), chosen(row, inputs)
    others = {name: value[order] for name, value in inputs.items() if name in TEXT}

    def talk(hidden: Any) -> Tensor:
        first = ask(model, None, inputs, lambda text: hidden(text, keep))
        first.cache.batch_select_indices(order)
        text = {name: value[order] for name, value in first.inputs.items()}
        before = Turn(text, first.tokens, first.logits, first.cache)
        return ask(model, before, said([3, 4, 2], 5), lambda text: hidden(others, keep[order])).logits

    with prune(model, EVERYTHING, choose=uneven()):
        found = talk(lambda text, keep: nullcontext())
    masked = talk(lambda text, keep: row.oracle.masked(model, text, keep))
    exact(found, masked, atol=row.tolerance() * scale(masked))
