"""Oracle for decoders in which layers with a recurrent state and attention take turns.

A recurrent layer has no mask that hides one row from another, so the reference is the language model run on the
shorter sequence at the same positions: one sample at a time, without padding, with a cache of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tests.support.decoder_oracle import Decoder
from tests.support.oracles import CACHE, Inputs, columns_kept, of_rows


@dataclass(frozen=True)
class Recurrent(Decoder):
    """Oracle for models whose decoder has layers with a recurrent state."""

    @contextmanager
    def masked(self, model: PreTrainedModel, inputs: Inputs, keep: Tensor) -> Iterator[None]:
        stack: Any = model.get_submodule(self.path)
        short = ShortRuns(stack, stack.forward, columns_kept(inputs, keep))
        with ExitStack() as undo:
            undo.enter_context(patch.object(stack, "forward", short))
            undo.enter_context(
                patch.object(DynamicCache, "reorder_cache", short.reordering(DynamicCache.reorder_cache))
            )
            yield


@dataclass
class ShortRuns:
    """A decoder stack that runs each row of a batch by itself, on the columns that stay.

    Attributes:
        stack: the decoder stack.
        own: its own forward.
        columns: bool [B, L], the columns of the prompt that stay.
        caches: the cache of each row.
    """

    stack: Any
    own: Callable[..., Any]
    columns: Tensor
    caches: list[DynamicCache] = field(default_factory=list)

    def __call__(self, **kwargs: Any) -> Any:
        cache, embeds = kwargs.get(CACHE), kwargs.get("inputs_embeds")
        past = 0 if cache is None else cache.get_seq_length()
        embeds = self.stack.embed_tokens(kwargs.pop("input_ids")) if embeds is None else embeds
        rows, new = embeds.shape[:2]
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        real = torch.ones(rows, past + new) if mask is None else mask
        positions = torch.arange(past, past + new).expand(rows, -1) if positions is None else positions
        positions = positions.expand(*positions.shape[:-2], rows, -1)
        stays = torch.ones(rows, past + new, dtype=torch.bool)
        stays[:, : self.columns.shape[1]] = of_rows(self.columns, rows)
        gone, stays = ~stays[:, past:], (stays & real.bool())[:, past:]
        output = self.own(**{**kwargs, "inputs_embeds": embeds})  # fills the caller's cache: its length is read
        if past == 0:
            self.caches = [DynamicCache(config=self.stack.config) for _ in range(rows)]
        for row, kept in enumerate(stays):
            alone = self.own(
                **{
                    **kwargs,
                    "inputs_embeds": embeds[row : row + 1, kept],
                    "position_ids": positions[..., row : row + 1, kept],
                    "attention_mask": torch.ones(1, self.caches[row].get_seq_length() + int(kept.sum())).long(),
                    CACHE: self.caches[row],
                    "use_cache": True,
                }
            )
            put_back(output, alone, row, kept, gone[row])
        return output

    def reordering(self, own: Callable[..., None]) -> Callable[..., None]:
        def reorder_cache(cache: DynamicCache, beams: Tensor) -> None:
            own(cache, beams)
            self.caches = [deepcopy(self.caches[beam]) for beam in beams.tolist()]

        return reorder_cache


def put_back(output: Any, alone: Any, row: int, kept: Tensor, gone: Tensor) -> None:
    """Write the states and attention maps of one row, computed on its kept columns, into the whole batch's output.

    Args:
        output: the whole batch's output; rows of padding stay as they are in it.
        alone: the row's output.
        row: number of the row.
        kept: bool [new columns], the columns that were computed.
        gone: bool [new columns], the columns that are dropped.
    """
    states = {id(full): (full, short) for full, short in _pairs(output, alone, "hidden_states")}
    states[id(output.last_hidden_state)] = (output.last_hidden_state, alone.last_hidden_state)
    for full, short in states.values():
        full[row, gone] = 0
        full[row, kept] = short[0]
    for full, short in _pairs(output, alone, "attentions"):
        square, places = torch.zeros_like(full[row]), kept.nonzero()
        square[:, places, places[:, 0]] = short[0]
        full[row] = square


def _pairs(output: Any, alone: Any, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(output.get(name) or (), alone.get(name) or (), strict=True)
