"""A selector that merges by a script, and the full run in which the means are written."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from catp_lightning import PruningPolicy
from catp_lightning.methods.selection import Selection
from catp_lightning.methods.selectors import Selector
from catp_lightning.pruning import Pruning
from tests.support.oracles import Inputs, hooked, visual_columns
from tests.support.rows import Row


@dataclass(frozen=True)
class Scripted(Selector):
    """Groups that differ from row to row: some of one token, some of several, some tokens lost.

    All depends on the order of the scores alone, which no batch changes. Where the highest score stands at an odd place
    one token more stays than was asked for, so that samples differ in how many they keep.
    """

    nested: ClassVar[bool] = False
    merges: ClassVar[bool] = True

    def select(self, scores: Tensor, visual: Tensor, counts: Tensor, vectors: Tensor | None) -> Selection:
        keep, destination = torch.zeros_like(visual), torch.full_like(visual, -1, dtype=torch.long)
        for row, order in enumerate(orders(scores, visual)):
            if order:
                kept = int(counts[row]) + order[0] % 2
                keep[row, order[:kept]] = True
                for token, into in script(order, min(kept, len(order))).items():
                    destination[row, token] = into
        return Selection(keep, destination)


def orders(scores: Tensor, visual: Tensor) -> Iterator[list[int]]:
    """Tokens of each row that exist, the highest score first."""
    for values, there in zip(scores.tolist(), visual.tolist(), strict=True):
        own = [token for token, valid in enumerate(there) if valid]
        yield sorted(own, key=lambda token, values=values: -values[token])


def script(order: list[int], kept: int) -> dict[int, int]:
    """Which token carries which, of one row; those that are lost are left out."""
    stay, carrier = order[:kept], {token: token for token in order[:kept]}
    for number, token in enumerate(order[kept:]):
        if (number + order[0]) % 3 != 1:
            carrier[token] = stay[number * number % max(1, kept - 1)]  # the last that stays carries itself alone
    return carrier


def policy(keep: int | float = 0.25, **args: Any) -> PruningPolicy:
    return PruningPolicy(scorer="l2-norm", selector="scripted", selector_args=args, keep=keep)


def groups(carrier: Tensor) -> list[dict[int, list[int]]]:
    """Of each sample, which tokens a token carries: int64 [B, T]."""
    found: list[dict[int, list[int]]] = []
    for row in carrier.tolist():
        own: dict[int, list[int]] = {}
        for token, lead in enumerate(row):
            if lead >= 0:
                own.setdefault(lead, []).append(token)
        found.append(own)
    return found


def written(rows: Tensor, columns: Tensor, carrier: Tensor) -> Tensor:
    """Rows [R, L, D] in which each carrier's is the mean of its group: tokens at bool [B, L], int64 [B, T]."""
    found, beams, wide = rows.clone(), len(rows) // len(columns), rows.to(torch.promote_types(rows.dtype, torch.float))
    for row in range(len(rows)):
        places = columns[row // beams].nonzero()[:, 0].tolist()
        for lead, tokens in groups(carrier)[row // beams].items():
            mean = sum(wide[row, places[token]] for token in tokens) / len(tokens)
            found[row, places[lead]] = mean.to(rows.dtype)
    return found


def with_means(kwargs: dict[str, Any], columns: Tensor, carrier: Tensor) -> dict[str, Any]:
    """Arguments of a decoder in which the means are written: its rows, and the features added to them later."""
    embeds = kwargs["inputs_embeds"]
    changes = {"inputs_embeds": written(embeds, columns, carrier)}
    if kwargs.get("deepstack_visual_embeds"):
        places = kwargs["visual_pos_masks"]
        deep = []
        for features in kwargs["deepstack_visual_embeds"]:
            rows = embeds.new_zeros(embeds.shape)
            rows[places] = features
            deep.append(written(rows, columns, carrier)[places])
        changes["deepstack_visual_embeds"] = deep
    return changes


@contextmanager
def merged(row: Row, model: PreTrainedModel, inputs: Inputs, pruning: Pruning) -> Iterator[None]:
    """The oracle: while inside, `model` reads the means at the carriers' places, and tokens that left are masked."""
    columns, length = visual_columns(inputs), inputs["input_ids"].shape[1]
    keep, carrier = pruning.keep, pruning.destination
    assert keep is not None and carrier is not None

    def write(stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        embeds = kwargs.get("inputs_embeds")
        if embeds is None or embeds.shape[1] < length:  # a decoding step
            return {}
        return with_means(kwargs, columns, carrier)

    with hooked([model.get_submodule(row.oracle.path)], write), row.oracle.masked(model, inputs, keep):
        yield


def entering(row: Row, model: PreTrainedModel, inputs: Inputs) -> dict[str, Any]:
    """What the decoder is called with."""
    seen: dict[str, Any] = {}
    with hooked([model.get_submodule(row.oracle.path)], lambda module, args, kwargs: seen.update(kwargs) or {}):
        model(**row.oracle.forward_inputs(inputs))
    return seen


def of_one_image(row: Row) -> list[int]:
    """Samples of at most one image: of several, older versions of generate give a beam the first one twice."""
    return [number for number, sample in enumerate(row.samples()) if len(sample.images) < 2]
