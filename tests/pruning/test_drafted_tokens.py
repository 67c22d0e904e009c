"""Prompt-lookup and assisted decoding: tokens are drafted, read together, and some are taken back from the cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from catp_lightning import PruningPolicy, Stage, prune
from tests.support.caches import INSIDE, kept_by
from tests.support.families import BY_NAME, OLDEST
from tests.support.matrix import EVERYTHING, chosen, exact, greedily, scale, uneven
from tests.support.oracles import IMAGE, Inputs
from tests.support.rows import Row
from tests.support.small_configs import GATED

pytestmark = pytest.mark.usefixtures("no_grad")

COUNT = 12
LOOKUP: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
ONCE_MORE: dict[str, Any] = {"repetition_penalty": 0.6}  # words of the prompt are likely, so that drafts are right
OUTPUT: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}
WINDOWS = ("Gemma3", "Mistral3, sliding window")
SCHEDULE = PruningPolicy(
    "position", keep=6, then=[Stage("fastv", {"layer": 1}, keep=3), Stage("visual-exit", {"layer": 2})]
)
NAMES = ("Llava", "Qwen2.5-VL", *WINDOWS, "Blip2-OPT", "InstructBlip")


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """Yield the number of rows that logits are asked of in each call."""
    rows: list[int] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, args, output: rows.append(output.shape[1]))
    try:
        yield rows
    finally:
        hook.remove()


def answer(model: PreTrainedModel, inputs: Inputs, **settings: Any) -> tuple[Tensor, Tensor]:
    """Return new tokens [B, n] and the logits of every step [B, n, V], float32."""
    found = model.generate(**inputs, **greedily(model, COUNT), **ONCE_MORE, **OUTPUT, **settings)
    return found.sequences[:, -COUNT:], torch.stack(found.logits, 1)


def ending(row: Row, words: int = 2) -> Inputs:
    """Return a prompt that ends as it begins after its first word: something is drafted before the first call.

    But not for BLIP-2: transformers then reads the prompt without the draft and goes on as if it had read it.
    """
    inputs = row.inputs([0])
    if "Blip" in row.name:
        return inputs
    words_of = (inputs["input_ids"] < 100).nonzero()[1:, 1]
    inputs["input_ids"][0, -words:] = inputs["input_ids"][0, words_of[:words]]
    return inputs


def another() -> PreTrainedModel:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**GATED)).eval().double()


def fails(reason: str) -> pytest.MarkDecorator:
    return pytest.mark.xfail(OLDEST, reason=reason, strict=True)


WINDOW = fails("transformers 5.13 cannot take tokens back from a window that is full, unpruned as well")
CASES = [
    *(pytest.param(name, False, marks=WINDOW if name in WINDOWS else ()) for name in NAMES),
    pytest.param("Llava", True, marks=fails("transformers 5.13 hands the assistant pixels, which it refuses")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "assisted"), CASES)
def test_drafted_answers_equal_those_of_the_masked_model(name: str, assisted: bool) -> None:
    row = BY_NAME[name]
    model, inputs, settings = row.model(), ending(row), {"assistant_model": another()} if assisted else LOOKUP
    keep = chosen(row, inputs)
    with prune(model, EVERYTHING, choose=uneven()) as pruning:
        tokens, _ = answer(model, inputs)
        with counted(model) as rows:
            drafted, logits = answer(model, inputs, **settings)
    with row.oracle.masked(model, inputs, keep):
        masked, masked_logits = answer(model, inputs)
    assert torch.equal(pruning.keep, keep)
    assert max(rows) > 1, "something must have been drafted"
    assert torch.equal(drafted, tokens) and torch.equal(drafted, masked)
    exact(logits, masked_logits, atol=2e-5 * scale(masked_logits))


@fails("transformers 5.13 cuts all layers to one length, which they do not have: refused")
@pytest.mark.parametrize(("name", "policy"), [("Llava", INSIDE), ("InternVL", INSIDE), ("Llava", SCHEDULE)])
def test_drafted_answers_equal_others_where_tokens_leave_inside_the_decoder(name: str, policy: PruningPolicy) -> None:
    row = BY_NAME[name]
    model, inputs = row.model(), ending(row)
    with prune(model, policy, **kept_by(policy)):
        tokens, expected = answer(model, inputs)
        with counted(model) as rows:
            drafted, logits = answer(model, inputs, **LOOKUP)
    assert max(rows) > 1 and torch.equal(drafted, tokens)
    exact(logits, expected, atol=2e-5 * scale(expected))


def test_what_is_drafted_does_not_belong_to_the_prompt() -> None:
    """A scorer that reads the question chooses the same tokens."""
    row = BY_NAME["Llava"]
    model, inputs = row.model(), ending(row)
    with prune(model, PruningPolicy("cdpruner", keep=4)) as pruning:
        answer(model, inputs)
        scores = pruning.scores
        with counted(model) as rows:
            answer(model, inputs, **LOOKUP)
    assert rows[0] > 1, "the first call must read a draft"
    assert torch.equal(pruning.scores, scores)


class Says(hf.LogitsProcessor):
    """Make a word the first that is generated after a prompt of `length` columns."""

    def __init__(self, word: int, length: int) -> None:
        self.word, self.length = word, length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        own = torch.arange(scores.shape[1]) == self.word
        return scores.masked_fill(~own, -torch.inf) if input_ids.shape[1] == self.length else scores


def test_placeholders_that_are_drafted_after_a_word_that_stood_before_an_image_are_no_image() -> None:
    row = BY_NAME["Llava"]
    model, inputs = row.model(), row.inputs([0])
    ids = inputs["input_ids"]
    word = ids[0, int((ids[0] == IMAGE).long().argmax()) - 1] = 91  # it stands nowhere else
    settings = {"logits_processor": [Says(word, ids.shape[1])], "suppress_tokens": None, "max_new_tokens": 4}
    ways, drafted = {**greedily(model, 4), **settings}, []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        drafted.append(int((kwargs["input_ids"] == IMAGE).sum()))

    hook = model.model.register_forward_pre_hook(look, with_kwargs=True)
    with prune(model, EVERYTHING, choose=uneven()) as pruning:
        expected = model.generate(**inputs, **ways)
        drafted.clear()
        found = model.generate(**inputs, **ways, **LOOKUP)
    hook.remove()
    assert any(drafted[1:]), "placeholders must have been drafted"
    assert torch.equal(found, expected) and pruning.prefills == 2
