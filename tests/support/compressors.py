"""Policies whose scorer is a compressor with random weights, and the full run in which its rows are written."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from catp_lightning import PruningPolicy
from catp_lightning.methods.observation import Signal
from catp_lightning.methods.scorers import SCORERS, DyVTE
from catp_lightning.methods.weights import encoded
from catp_lightning.models import find_family
from tests.support.oracles import Inputs, hooked, visual_columns
from tests.support.rows import Row
from tests.support.stages import masked

COMPRESSORS = ("quecc", "flashsloth")


def compressor(
    name: str = "quecc", tokens: int = 3, on_grid: bool = True, features: int = 32, width: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Fields of a policy whose rows are far from the tokens that they take the place of."""
    empty: Any = SCORERS[name](tokens=tokens, on_grid=on_grid)  # type: ignore[call-arg]
    generator = torch.Generator(device="cpu").manual_seed(seed)
    weights = empty.initial(empty.sizes_for(features, width, tokens), generator)
    drawn = {key: value + 0.5 * torch.randn(value.shape, generator=generator) for key, value in weights.items()}
    scorer = empty.with_weights(drawn)
    return {
        "scorer": name,
        "scorer_args": {"weights": scorer.weights, "tokens": tokens, "on_grid": on_grid},
        "keep": tokens,
    }


def exiting(layers: int = 2, features: int = 32, seed: int = 0) -> dict[str, Any]:
    """Fields of a policy whose scorer is a DyVTE with random weights, for a decoder of `layers` + 1 layers."""
    sizes = DyVTE.sizes_for(features, 8, layers)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    shapes = {name: tuple(sizes[one] for one in names) for name, names in DyVTE.shapes.items()}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {"scorer": "dyvte", "scorer_args": {"weights": encoded(drawn), "threshold": 0.5}}


def policy_for(model: PreTrainedModel, name: str, tokens: int = 3, seed: int = 0) -> PruningPolicy:
    """A policy for a model: on the grid, where the model has one."""
    family = find_family(model)
    on_grid = family.shows({Signal.PATCH_POSITION})
    return PruningPolicy(**compressor(name, tokens, on_grid, int(family.decoder_config.hidden_size), seed=seed))


@contextmanager
def placed(
    row: Row,
    model: PreTrainedModel,
    inputs: Inputs,
    keep: Tensor,
    rows: Tensor,
    later: tuple[tuple[int, ...], list[Tensor]] | None = None,
) -> Iterator[None]:
    """The oracle: while inside, `model` reads these rows at the kept tokens' places, and all other tokens are masked.

    Args:
        row: the family.
        model: its model.
        inputs: the prompts.
        keep: bool [B, T].
        rows: float [B, T, D], what is read in the place of each token.
        later: layers, 0 first, and what stays at each; None: only the decoder's input.
    """
    columns, length = visual_columns(inputs), inputs["input_ids"].shape[1]

    def write(stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        embeds = kwargs.get("inputs_embeds")
        if embeds is None or embeds.shape[1] < length:  # a decoding step
            return {}
        embeds, beams = embeds.clone(), len(embeds) // len(columns)
        for number in range(len(embeds)):
            places = columns[number // beams].nonzero()[:, 0].tolist()
            for token, place in enumerate(places):
                if keep[number // beams, token]:
                    embeds[number, place] = rows[number // beams, token]
        return {"inputs_embeds": embeds}

    hidden = row.oracle.masked(model, inputs, keep) if later is None else masked(row, model, inputs, *later)
    with hooked([model.get_submodule(row.oracle.path)], write), hidden:
        yield
