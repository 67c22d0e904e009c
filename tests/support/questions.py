"""Policies that know the question, for small models whose words have 32 dimensions."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from catp_lightning.methods.components import Features, Question
from catp_lightning.methods.network import Network, shapes

WIDTH = 32


def components(count: int = 2, width: int = WIDTH, seed: int = 0) -> Question:
    """Random components of a question."""
    draw = np.random.default_rng(seed)
    return Question.of(draw.standard_normal((count, width)), 0.1 * draw.standard_normal(count))


def routed(*rules: Mapping[str, Any], seed: int = 0, width: int = WIDTH) -> dict[str, Any]:
    """Fields of a policy that routes questions between rules, the first its own, by random components."""
    first, *others = rules
    weights = np.random.default_rng(seed + 1).standard_normal((len(rules), 3))
    weights[:, 2] = 0  # no rule is the best for most questions
    router = {"question": asdict(components(2, width, seed)), "divergence": weights.tolist()}
    return {**first, "routes": {"rules": [dict(rule) for rule in others], "router": router}}


def counted(rule: Mapping[str, Any], seed: int = 0, width: int = WIDTH, weight: float = 0.8) -> dict[str, Any]:
    """Fields of a policy under which samples keep different numbers of tokens, by random components of a question."""
    counts = {"question": asdict(components(2, width, seed)), "weights": [weight, weight, 0.1]}
    return {**rule, "counts": counts}


def network(slots: int = 1, seed: int = 0, width: int = WIDTH, features: int = WIDTH, hidden: int = 8) -> Network:
    """Random network for 3 components of a token, whose features have `features` dimensions, and 2 of a question."""
    draw = np.random.default_rng(seed + 2)
    tokens = Features.of(draw.standard_normal((3, features)) / features, np.zeros(3))
    wanted = shapes(3, 2, slots, hidden)
    weights = {name: torch.from_numpy(draw.standard_normal(shape)) for name, shape in wanted.items()}
    return Network.of(tokens, components(2, width, seed), weights)


def learned(slots: int = 1, seed: int = 0, width: int = WIDTH, features: int = WIDTH) -> dict[str, Any]:
    """Fields of a policy whose scorer is a random network."""
    return {"scorer": "learned", "scorer_args": {"network": asdict(network(slots, seed, width, features))}}
