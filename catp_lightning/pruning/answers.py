"""Answers of a model: generated ids, or the most likely next token if a step only calls forward."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from catp_lightning.errors import PruningError
from catp_lightning.models import Family
from catp_lightning.prompt.caches import CACHE_NAMES, cache_in
from catp_lightning.pruning.endings import Endings, warned_of_chance
from catp_lightning.pruning.pruner import Pruner
from catp_lightning.utils.hooks import hooked, replaced


@dataclass(frozen=True)
class Answer:
    """Answers of one top-level call; R answers, A tokens of the longest.

    Attributes:
        ids: int64 [R, A], token ids; those that the decoder of an encoder-decoder starts from come first.
        valid: bool [R, A], True up to and with the token that ended the answer.
        prompts: number of prompts, B; R is a multiple of it.
        row: int64 [B], the column of the prompt whose output predicts the first token.
    """

    ids: Tensor
    valid: Tensor
    prompts: int
    row: Tensor

    def same_as(self, other: "Answer") -> Tensor:
        """Return True for each prompt whose answers are all equal up to their end: bool [B]."""
        width = max(self.ids.shape[1], other.ids.shape[1])
        ours, theirs = _padded(self, width), _padded(other, width)
        return (ours == theirs).view(self.prompts, -1).all(1)


def _padded(answer: Answer, width: int) -> Tensor:
    ids = answer.ids.masked_fill(~answer.valid, -1)
    return torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=-1)


@contextmanager
def listening(
    family: Family,
    after: Callable[[Answer], None],
    before: Callable[[Callable[[], Answer]], None] | None = None,
    active: Callable[[], bool] = lambda: True,
) -> Iterator[None]:
    """Hand the answer of every top-level `generate` or forward of the model to `after`, while inside.

    Args:
        family: family of the model.
        after: called with the answer.
        before: called first, with a function that makes the same call, with a cache of its own and without the caller's
            streamer, and returns its answer.
        active: returns True if a call that begins is to be heard.

    Raises:
        PruningError: answers are sampled or end by the clock, so that two runs of the very same model differ; or a
            prompt goes on where a filled cache ends, and cannot be answered again without what is in it.
    """
    model = family.model
    forward: Callable[..., Any] = model.forward
    state = {"inside": False, "prompt": False}

    def quietly(call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        state["inside"] = True
        try:
            with warned_of_chance(model):
                return call(*args, **kwargs)
        finally:
            state["inside"] = False

    def answered(generate: Callable[..., Any], args: Any, kwargs: Any, named: dict[str, Any]) -> tuple[Any, Answer]:
        endings = Endings(family.language_model)
        with endings.watched():
            output = quietly(generate, args, kwargs)
        return output, generated(endings, output, named)

    def listened_generate(generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if state["inside"] or not active():
            return generate(*args, **kwargs)
        named = _named(generate, args, kwargs)
        if goes_on(named):
            raise PruningError(
                "generate was given a filled cache, and calibration and compare=True answer a prompt several times, "
                "each time from its beginning. Generate from the whole text, with all of its images and without "
                "a cache."
            )
        if before is not None:
            before(lambda: answered(generate, args, from_the_beginning(kwargs), named)[1])
        output, answer = answered(generate, args, kwargs, named)
        after(answer)
        return output

    def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if state["inside"]:
            return
        if not active():
            state["prompt"] = False
            return
        named = _named(forward, args, kwargs)
        state["prompt"] = _is_prompt(named)  # asked before the call, which will fill the cache
        if before is not None and state["prompt"]:
            before(lambda: predicted(family, quietly(model, args, from_the_beginning(kwargs)), named))

    def after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not state["inside"] and state["prompt"]:
            after(predicted(family, output, _named(forward, args, kwargs)))

    with ExitStack() as undo:
        undo.enter_context(hooked(model, before_forward, after_forward))
        undo.enter_context(replaced(model, "generate", listened_generate))
        yield


def generated(endings: Endings, output: Any, named: dict[str, Any]) -> Answer:
    """Return the answer in the output of `generate`: sequences, with or without the prompt before them.

    Raises:
        PruningError: `generate` was called without input_ids.
    """
    ids = output if isinstance(output, Tensor) else output.sequences
    prompt = named.get("input_ids")
    if prompt is None:
        raise PruningError(
            "generate was called without input_ids: its answer cannot be told from its prompt. Pass the ids that the "
            "processor makes from images and text; for captions the text is empty."
        )
    prompts, length = prompt.shape
    repeated = prompt.repeat_interleave(len(ids) // prompts, 0)
    if ids.shape[1] >= length and torch.equal(ids[:, :length], repeated):
        ids = ids[:, length:]
    valid = endings.valid(ids, prompts, named)
    ids = ids.masked_fill(~valid, 0)  # beams may be padded with ids that are no token
    return Answer(ids, valid, prompts, torch.full((prompts,), length - 1, device=ids.device, dtype=torch.int64))


def predicted(family: Family, output: Any, named: dict[str, Any]) -> Answer:
    """Return the most likely token after the prompt: after the last real column, or where `labels` begin.

    Raises:
        PruningError: the logits lack the row after which the answer begins.
    """
    logits, ids = output.logits, named["input_ids"]
    if family.model.config.is_encoder_decoder:  # logits are of the decoder's rows: the first, or the last given
        return _most_likely_of_decoder(family, logits, named.get("decoder_input_ids"))
    columns = torch.arange(ids.shape[1], device=logits.device)
    mask, labels = named.get("attention_mask"), named.get("labels")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if labels is not None:
        answers = torch.nn.functional.pad(labels != -100, (ids.shape[1] - labels.shape[1], 0))
        real = real & (answers.cumsum(1) == 0)
    row, left_out = (real * columns).amax(1), ids.shape[1] - logits.shape[1]  # logits_to_keep: the last rows only
    if bool((row < left_out).any()):
        raise PruningError(
            f"The answer follows row {int(row.min())} of the prompt, and the step asked for the last {logits.shape[1]} "
            "rows of logits. Call the model without logits_to_keep, or generate."
        )
    return _most_likely(logits, row, left_out)


def _most_likely(logits: Tensor, row: Tensor, left_out: int) -> Answer:
    """Return the most likely token after row int64 [B]; logits [B, R, V] lack the first `left_out` rows."""
    best = logits.gather(1, (row - left_out)[:, None, None].expand(-1, 1, logits.shape[-1])).argmax(-1)
    return Answer(best, torch.ones_like(best, dtype=torch.bool), len(row), row)


def _most_likely_of_decoder(family: Family, logits: Tensor, given: Tensor | None) -> Answer:
    """Return what a decoder starts from, `given` [B, R] or its start token, and the most likely token after it."""
    if given is None:
        start: int = family.language_model.config.decoder_start_token_id
        given = torch.full((len(logits), 1), start, device=logits.device, dtype=torch.int64)
    row = torch.full((len(logits),), given.shape[1] - 1, device=logits.device, dtype=torch.int64)
    best = _most_likely(logits, row, 0)
    ids = torch.cat([given.to(logits.device), best.ids], 1)
    return Answer(ids, torch.ones_like(ids, dtype=torch.bool), len(ids), row)


@dataclass
class AnswerComparison:
    """Comparison of the answers of a pruned model with those of the unpruned one.

    Attributes:
        same: bool [B] of each top-level call since it was last cleared, True if the pruned answer is the unpruned one.
    """

    same: list[Tensor] = field(default_factory=list)


@contextmanager
def compare_with_unpruned(pruner: Pruner) -> Iterator[AnswerComparison]:
    """Make every top-level call twice while inside, unpruned first, and compare the answers.

    Args:
        pruner: the pruning that this runs in, from `applied`; its model is listened to.

    Yields:
        The comparison, which grows with each call.

    Raises:
        PruningError: a call samples its answers, or ends them by the clock.
    """
    comparison, unpruned = AnswerComparison(), []

    def before(again: Callable[[], Answer]) -> None:
        with pruner.suspended():
            unpruned.append(again())

    def after(answer: Answer) -> None:
        comparison.same.append(answer.same_as(unpruned.pop()))

    with listening(pruner.family, after, before):
        yield comparison


def _named(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in inspect.signature(call).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def from_the_beginning(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments for another call that answers the same prompt."""
    return {name: value for name, value in kwargs.items() if name not in (*CACHE_NAMES, "streamer")}


def _is_prompt(named: dict[str, Any]) -> bool:
    """Return True for a forward with ids and no filled cache.

    Decoding steps of a loop of the user's own answer nothing new.
    """
    return named.get("input_ids") is not None and not goes_on(named)


def goes_on(named: dict[str, Any]) -> bool:
    """Return True for a call that is given a filled cache."""
    cache = cache_in(named)
    return cache is not None and bool(cache.get_seq_length() > 0)
