"""Chats in several turns, in which each turn's cache is handed to the next, and what the model under a mask answers."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from tests.support.matrix import greedily
from tests.support.oracles import CACHE, PAD, Inputs, cache_of
from tests.support.rows import Row
from tests.support.steps import stepwise

COUNT = 3  # tokens that are generated at each turn
TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask")


@dataclass(frozen=True)
class Turn:
    """What a turn left: B samples, n generated tokens.

    Attributes:
        inputs: what was read so far and the tokens that were generated, as text tensors by name.
        tokens: int64 [B, n], the generated tokens.
        logits: float [B, n, V], the logits that they were chosen by.
        cache: the cache.
    """

    inputs: Inputs
    tokens: Tensor
    logits: Tensor
    cache: Any


Hidden = Callable[[Inputs], AbstractContextManager[None]]
"""Context in which the model reads a turn, given all text of the chat up to it."""


def said(lengths: Sequence[int], seed: int) -> Inputs:
    """Return what users say in one turn, padded on the left to the longest: ids and mask int64 [B, L]."""
    words = torch.randint(3, 90, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    place = torch.arange(max(lengths)).expand_as(words)
    own = torch.tensor(lengths)[:, None]
    mask = (place >= max(lengths) - own).long()
    return {"input_ids": words.masked_fill(mask == 0, PAD), "attention_mask": mask}


def joined(before: Inputs, more: Inputs) -> Inputs:
    """Return text tensors of a chat with `more` after them; types are 0 and text sees the image as the last row did."""
    count, found = more["input_ids"].shape[1], {}
    for name, value in before.items():
        if name == "cross_attention_mask":
            last = value[:, -1:].expand(-1, count, -1, -1)
        else:
            last = more.get(name, torch.zeros_like(more["input_ids"]))
        found[name] = torch.cat([value, last], 1)
    return found


def ask(model: PreTrainedModel, before: Turn | None, new: Inputs, hidden: Hidden, **settings: Any) -> Turn:
    """Take a turn: `new` is read after all that was said before, on the cache that it left."""
    text = {name: new[name] for name in TEXT if name in new}
    text = text if before is None else joined(before.inputs, text)
    given = {**text, **{name: value for name, value in new.items() if name not in text}}
    if before is not None:
        given[CACHE] = before.cache
    with hidden(text):
        ways = {**greedily(model, COUNT), "return_dict_in_generate": True, **settings}
        found, logits = stepwise(model, given, **ways)
    tokens = found.sequences[:, -COUNT:]
    answer = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return Turn(joined(text, answer), tokens, logits, cache_of(found))


def chat(row: Row, model: PreTrainedModel, turns: Sequence[Inputs], hidden: Hidden, **settings: Any) -> list[Turn]:
    found: list[Turn] = []
    for new in turns:
        again = turns[0] if row.name.startswith(("Blip2", "InstructBlip")) else {}  # reads pixels at every turn
        pixels = {name: value for name, value in again.items() if name not in TEXT}
        found.append(ask(model, found[-1] if found else None, {**pixels, **new}, hidden, **settings))
    return found


def both(tokens: Sequence[Tensor], keeps: Sequence[Tensor]) -> Tensor:
    """Return which visual tokens of a chat stay, bool [B, T], given those of each turn and which of them stay."""
    rows = []
    for own, kept in zip(zip(*tokens, strict=True), zip(*keeps, strict=True), strict=True):
        rows.append(torch.cat([keep[there] for there, keep in zip(own, kept, strict=True)]))
    longest = max(map(len, rows))
    return torch.stack([pad(row, (0, longest - len(row)), value=False) for row in rows])


def coordinates(row: Row, model: PreTrainedModel, text: Inputs, *turns: tuple[Sequence[int], Inputs]) -> Tensor:
    """Return position ids [3, B, L] of a chat of several images, as the model counts them if it reads them at once.

    Args:
        row: a family whose position ids have axes.
        model: the model.
        text: text tensors of the whole chat.
        turns: for each turn the samples that its images are of, and its inputs.
    """
    samples = row.samples()
    ordered = [image.tensors for own in zip(*(rows for rows, _ in turns), strict=True) for i in own
               for image in samples[i].images]  # fmt: skip
    names = ("image_grid_thw", "video_grid_thw")
    sizes = {name: [t[name] for t in ordered if name in t] for name in names}
    sizes = {name: torch.stack(found) for name, found in sizes.items() if found}
    types, mask = text["mm_token_type_ids"], text["attention_mask"]
    positions, _ = model.model.get_rope_index(text["input_ids"], mm_token_type_ids=types, attention_mask=mask, **sizes)
    return positions


def held(row: Row, turn: Turn) -> int:
    """Return the number of rows in a turn's cache, where visual tokens are cached."""
    return row.oracle.cached(BaseModelOutputWithPast(**{CACHE: turn.cache}))
