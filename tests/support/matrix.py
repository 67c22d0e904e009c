"""What tests of every family share: the rows as parameters, a choice of tokens, and generating step by step."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from catp_lightning import PruningPolicy
from tests.support.families import ROWS
from tests.support.hybrid_families import HYBRID
from tests.support.latest_families import LATEST
from tests.support.layered_families import LAYERED
from tests.support.newer_families import NEWER
from tests.support.oracles import END, IMAGE, START, VIDEO, Inputs
from tests.support.picture_families import PICTURED
from tests.support.rows import Row
from tests.support.steps import stepwise

STEPS = 4
EVERYTHING = PruningPolicy()
MORE = [*NEWER, *PICTURED, *LATEST, *LAYERED, *HYBRID]


def every(row: Row) -> bool:
    return True


KIN = {
    *("LlavaNextVideo", "LlavaOnevision-video", "VipLlava", "Idefics3", "InstructBlip-T5", "InstructBlipVideo"),
    *("Gemma3, image token outside the vocabulary", "Mistral3", "Qwen2-VL", "PaliGemma", "Pixtral"),
    *("LlavaNext", "LlavaOnevision", "VideoLlava", "InternVL", "SmolVLM"),  # decoders as Llava's
}
"""Rows of `ROWS` whose decoder another one has too: slow, as newer types are, but in the first test of dropping."""


def cases(holds: Callable[[Row], bool], *more: object, name: str = "", quick: bool = False) -> list[Any]:
    """Parameters of a test: rows, and beside each `more`, which `name` names; many rows are slow unless `quick`."""
    fast = {row.name for row in ROWS} - KIN
    return [
        pytest.param(row, *more, id=f"{row}{name}", marks=() if quick or row.name in fast else pytest.mark.slow)
        for row in filter(holds, (*ROWS, *MORE))
    ]


def rows_where(holds: Callable[[Row], bool]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", cases(holds))


every_row = rows_where(every)
every_type = pytest.mark.parametrize(
    ("row", "dtype", "attention"),
    [
        *cases(every, torch.float64, None, name=", float64", quick=True),
        *cases(every, torch.float32, "eager", name=", float32 eager"),
    ],
)
exact = functools.partial(torch.testing.assert_close, rtol=0.0)


def uneven(rows: Sequence[int] | None = None) -> Callable[[Tensor], Tensor]:
    """A choice that belongs to each sample, whatever batch it is in: another number each, scattered.

    Args:
        rows: which samples the batch is made of; by default all.
    """
    order = torch.rand(4, 64, generator=torch.Generator().manual_seed(4))
    counts = torch.tensor([2, 4, 3, 5])  # few: what fills up shorter samples should not be most of what was dropped

    def choose(tokens: Tensor) -> Tensor:
        own = torch.arange(len(tokens)) if rows is None else torch.tensor(rows)
        scores = order[own, : tokens.shape[1]].masked_fill(~tokens, -1.0)
        count = counts[own].minimum((tokens.sum(1) - 1).clamp(min=0))[:, None]
        return scores.argsort(1, descending=True).argsort(1) < count

    return choose


def generate(
    row: Row, model: PreTrainedModel, inputs: Inputs, count: int = STEPS, **settings: Any
) -> tuple[Tensor, Tensor]:
    """New tokens int64 [R, count], greedily by default, and the logits of every step [rows, count, V]."""
    sequences, steps = stepwise(model, inputs, **{**greedily(model, count), **settings})
    return sequences[:, -count:], steps


def greedily(model: PreTrainedModel, count: int) -> dict[str, Any]:
    """Settings of generate for `count` tokens, none of which marks an image."""
    words = len(model.get_output_embeddings().weight)
    marks = [token for token in (IMAGE, VIDEO, START, END) if token < words]
    return {"max_new_tokens": count, "min_new_tokens": count, "suppress_tokens": marks, "do_sample": False}


def chosen(row: Row, inputs: Inputs, rows: Sequence[int] | None = None) -> Tensor:
    return uneven(rows)(row.oracle.tokens(inputs))


def scale(logits: Tensor) -> float:
    return logits.abs().max().item()


def settled(row: Row) -> PreTrainedModel:
    """A model that was called before: transformers itself sets hooks and attributes then, and they stay."""
    model = row.model()
    model(**row.oracle.forward_inputs(row.inputs()))
    return model


BEAMS = {"num_beams": 3}
SAMPLED_BEAMS = {"num_beams": 3, "num_return_sequences": 2, "do_sample": True, "top_k": 0}


class PlantedError(Exception):
    pass


def fail(*args: object) -> Any:
    raise PlantedError
