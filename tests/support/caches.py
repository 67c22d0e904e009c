"""Policies that drop in every place, and loops that decode by hand on a cache."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from catp_lightning import PruningPolicy
from tests.support.families import BY_NAME
from tests.support.matrix import EVERYTHING, uneven
from tests.support.oracles import Inputs
from tests.support.rows import Row

WHOLE, FEW = PruningPolicy("position", keep=1.0), PruningPolicy("position", keep=2)
INSIDE = PruningPolicy("fastv", {"layer": 1}, keep=3)
QUICK = [("Llava", EVERYTHING), ("Blip2-T5", EVERYTHING), ("Mllama", EVERYTHING), ("Llava", INSIDE)]
EACH_PLACE = [
    pytest.param(
        BY_NAME[name],
        policy,
        id=f"{name} {policy.scorer}",
        marks=() if (name, policy) in QUICK else pytest.mark.slow,
    )
    for name, policy in [
        ("Llava", EVERYTHING),
        ("Blip2-OPT", EVERYTHING),
        ("Gemma3", EVERYTHING),
        ("Blip2-T5", EVERYTHING),
        ("Mllama", EVERYTHING),
        ("Llava", INSIDE),
        ("InternVL", INSIDE),
    ]
    if name in BY_NAME
]
every_place = pytest.mark.parametrize(("row", "policy"), EACH_PLACE)


def kept_by(policy: PruningPolicy) -> dict[str, Any]:
    return {"choose": uneven()} if policy is EVERYTHING else {}


def words(inputs: Inputs) -> Tensor:
    return torch.tensor([[17, 33, 5]]).expand(len(inputs["input_ids"]), -1)


def loop(row: Row, model: PreTrainedModel, inputs: Inputs) -> Iterator[Tensor]:
    return row.oracle.loop(model, inputs, words(inputs), with_positions=True)
