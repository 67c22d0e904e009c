"""An answer ends where the very call ended it, and calls of which two runs differ are refused, whoever says so."""

import queue
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import (
    Blip2ForConditionalGeneration,
    EosTokenCriteria,
    GenerationConfig,
    MaxTimeCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    TextIteratorStreamer,
)

from catp_lightning import PruningError, PruningPolicy
from catp_lightning.models import find_family
from catp_lightning.pruning.answers import Answer, compare_with_unpruned, listening
from catp_lightning.pruning.pruner import applied
from tests.support.tiny_vqa import QUERIES, SIZE, build_model, build_processor, opt_config, t5_config

pytestmark = pytest.mark.usefixtures("no_grad")


ENDS, COUNT, MOST = [6, 9, 12, 15, 18, 21], 8, 8
EVERYTHING = PruningPolicy("stride", keep=QUERIES)
ModelCall = dict[str, Any]


class EndsWith(StoppingCriteria):
    """Ends an answer with any of some tokens: a project's own, of which no config knows."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.isin(input_ids[:, -1], torch.tensor(ENDS))


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are single characters, from 4 on."""
    tokens = ["<pad>", "</s>", "<unk>", "<image>", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


CALLS: dict[str, Callable[[], ModelCall]] = {
    "eos_token_id": lambda: {"eos_token_id": ENDS},
    "one eos_token_id, which also pads": lambda: {"eos_token_id": 9, "pad_token_id": 9},
    "generation_config": lambda: {"generation_config": GenerationConfig(eos_token_id=ENDS)},
    "criteria alone": lambda: {"stopping_criteria": [EndsWith()]},
    "criteria, padded with the eos token": lambda: {
        "stopping_criteria": [EndsWith()],
        "eos_token_id": 3,
        "pad_token_id": 3,
    },
    "an eos criterion of one's own": lambda: {"stopping_criteria": [EosTokenCriteria(ENDS)], "eos_token_id": 2},
    "stop strings": lambda: {"stop_strings": ["c", "g", "jk", "m", "q"], "tokenizer": letters(), "eos_token_id": 2},
}
BEAMS = {"num_beams": 3}


def model_and_batch(text: Any = None) -> tuple[Blip2ForConditionalGeneration, dict[str, Tensor]]:
    """A model whose own config names no end, and prompts with answers of many lengths."""
    model = build_model(text or opt_config(), seed=3)
    for config in (model.generation_config, model.language_model.generation_config):
        config.eos_token_id = None
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 30, (COUNT, QUERIES + 6), generator=generator)
    ids[:, :QUERIES] = 3
    pixels = torch.randn(COUNT, 3, SIZE, SIZE, generator=generator)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def heard(model: Blip2ForConditionalGeneration, batch: dict[str, Tensor], call: ModelCall) -> Answer:
    answers: list[Answer] = []
    with listening(find_family(model), answers.append):
        model.generate(**batch, max_new_tokens=MOST, do_sample=False, **call)
    return answers[0]


def rows(answer: Answer) -> list[list[int]]:
    """Each answer up to its end."""
    return [ids[valid].tolist() for ids, valid in zip(answer.ids, answer.valid, strict=True)]


@pytest.mark.parametrize(
    ("case", "beams"),
    [
        *(pytest.param(case, {}, id=f"{case}, greedy") for case in CALLS),
        *(
            pytest.param(case, BEAMS, id=f"{case}, beams", marks=() if case == "stop strings" else pytest.mark.slow)
            for case in CALLS
        ),
    ],
)
def test_an_answer_ends_where_its_call_ended_it_whatever_its_batch(case: str, beams: ModelCall) -> None:
    model, batch = model_and_batch()
    together = rows(heard(model, batch, {**CALLS[case](), **beams}))
    alone = []
    for row in range(COUNT):
        single = {name: value[row : row + 1] for name, value in batch.items()}
        output = model.generate(**single, max_new_tokens=MOST, do_sample=False, **CALLS[case](), **beams)
        alone.append(output[0, QUERIES + 6 :].tolist())
    assert together == alone
    assert len({len(answer) for answer in alone}) > 2, "or the batch fills nothing up"


@pytest.mark.parametrize("beams", [{}, BEAMS], ids=["greedy", "beams"])
def test_an_encoder_decoder_whose_answers_begin_with_the_end_token_is_read_to_its_end(beams: ModelCall) -> None:
    model, batch = model_and_batch(t5_config())
    call = {"eos_token_id": [14, 23, 0], "pad_token_id": 0, **beams}  # 0 is what T5's decoder starts with
    together = rows(heard(model, batch, call))
    output = model.generate(**batch, max_new_tokens=MOST, do_sample=False, **call).tolist()
    ends = [next((n for n, token in enumerate(row) if n and token in call["eos_token_id"]), MOST) for row in output]
    assert together == [row[: end + 1] for row, end in zip(output, ends, strict=True)]
    assert len(set(ends)) > 1


def test_of_several_answers_to_a_prompt_each_ends_where_it_ended() -> None:
    model, batch = model_and_batch()
    call = {"stopping_criteria": [EndsWith()], "num_return_sequences": 2, **BEAMS}
    answer = heard(model, batch, call)
    assert len(answer.ids) == 2 * COUNT
    for ids in rows(answer):
        assert not set(ids[:-1]) & set(ENDS) and (ids[-1] in ENDS or len(ids) == MOST)


def test_a_generate_that_decodes_by_itself_ends_with_the_token_named_in_its_call() -> None:
    model, batch = model_and_batch()

    def by_hand(input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, **settings: Any) -> Tensor:
        ids = input_ids
        for _ in range(MOST):
            logits = model(input_ids=ids, pixel_values=pixel_values).logits[:, -1]
            ids = torch.cat([ids, logits[:, 4:].argmax(-1, keepdim=True) + 4], 1)
        return ids

    model.generate = by_hand  # type: ignore[assignment]
    answers: list[Answer] = []
    with listening(find_family(model), answers.append):
        model.generate(**batch, eos_token_id=ENDS)
        model.generate(**batch)
        with pytest.raises(PruningError, match="two runs of one model differ"):
            model.generate(**batch, generation_config=GenerationConfig(do_sample=True))
    lengths = answers[0].valid.sum(1)
    assert len(set(lengths.tolist())) > 2 and answers[1].valid.all()
    assert all(ids[-1] in ENDS or len(ids) == MOST for ids in rows(answers[0]))


def test_a_generate_that_joins_the_answers_of_several_calls_may_name_their_end_itself() -> None:
    model, batch = model_and_batch()
    whole = rows(heard(model, batch, {"eos_token_id": ENDS}))
    original = model.generate

    def in_halves(**inputs: Any) -> Tensor:
        halves = [
            {name: value[part] for name, value in inputs.items()}
            for part in (slice(COUNT // 2), slice(COUNT // 2, COUNT))
        ]
        found = [original(**half, max_new_tokens=MOST, do_sample=False, eos_token_id=ENDS) for half in halves]
        width = max(one.shape[1] for one in found)
        return torch.cat([torch.nn.functional.pad(one, (0, width - one.shape[1])) for one in found])

    model.generate = in_halves  # type: ignore[assignment]
    answers: list[Answer] = []
    with listening(find_family(model), answers.append):
        model.generate(**batch)
    assert rows(answers[0]) == whole


def own_defaults(model: Blip2ForConditionalGeneration) -> None:
    model.language_model.generation_config.update(do_sample=True, temperature=1.5)


@pytest.mark.parametrize(
    ("change", "call", "says"),
    [
        (own_defaults, {}, "do_sample=True"),
        (own_defaults, {"generation_config": GenerationConfig(max_new_tokens=3)}, "do_sample=True"),
        (own_defaults, {"num_beams": 2}, "do_sample=True"),
        (None, {"generation_config": GenerationConfig(do_sample=True)}, "do_sample=True"),
        (None, {"generation_config": GenerationConfig(), "do_sample": True}, "do_sample=True"),
        (own_defaults, {"do_sample": None}, None),
        (own_defaults, {"max_new_tokens": 3, "do_sample": False}, None),
        (own_defaults, {"generation_config": GenerationConfig(do_sample=False)}, None),
        (None, {"generation_config": GenerationConfig(do_sample=True), "do_sample": False}, None),
        (None, {"max_time": 60.0}, "end by the clock"),
        (None, {"stopping_criteria": [MaxTimeCriteria(60.0)]}, "end by the clock"),
    ],
)
def test_a_call_is_refused_by_what_transformers_makes_of_it(change: Any, call: ModelCall, says: str | None) -> None:
    model, batch = model_and_batch()
    if change is not None:
        change(model)
    with applied(model, EVERYTHING) as pruner, compare_with_unpruned(pruner) as comparison:
        if says is None:
            model.generate(**batch, **call)
            assert comparison.same[0].all()
            return
        with pytest.raises(PruningError, match=says):
            model.generate(**batch, **call)
        assert not comparison.same
        model.generate(**batch, max_new_tokens=2, do_sample=False)
        assert comparison.same[0].all(), "what was refused leaves nothing behind"


def draws(model: Blip2ForConditionalGeneration) -> ModelCall:
    """Decoding of one's own: transformers' greedy search over noise."""

    def noisy(ids: Tensor, scores: Tensor) -> Tensor:
        return scores + 3 * torch.randn_like(scores)

    return {"logits_processor": [noisy]}


def drops_out(model: Blip2ForConditionalGeneration) -> ModelCall:
    model.language_model.train()
    return {}


@pytest.mark.parametrize("by_chance", [draws, drops_out])
def test_answers_that_chance_decides_are_warned_of(by_chance: Callable[..., ModelCall]) -> None:
    model, batch = model_and_batch()
    with applied(model, EVERYTHING) as pruner, compare_with_unpruned(pruner):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.generate(**batch, max_new_tokens=2, do_sample=False)
            model(**batch)
        call = by_chance(model)
        with pytest.warns(UserWarning, match="two runs of it may differ"):
            model.generate(**batch, max_new_tokens=2, do_sample=False, **call)
        if by_chance is drops_out:
            with pytest.warns(UserWarning, match="two runs of it may differ"):
                model(**batch)


def test_a_streamer_is_given_the_pruned_answer_and_no_other() -> None:
    model, batch = model_and_batch()
    single = {name: value[:1] for name, value in batch.items()}
    streamer = TextIteratorStreamer(build_processor().tokenizer, skip_prompt=True)
    with applied(model, PruningPolicy("stride", keep=1)) as pruner, compare_with_unpruned(pruner):
        output = model.generate(**single, max_new_tokens=4, do_sample=False, streamer=streamer)
    assert "".join(streamer).split() == build_processor().tokenizer.decode(output[0, QUERIES + 6 :]).split()
    with pytest.raises(queue.Empty):
        streamer.text_queue.get_nowait()
