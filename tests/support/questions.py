"""Policies that know the question, for small models whose words have 32 dimensions."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from catp_lightning.methods.question import Question

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


def by_question(
    layers: Sequence[int], heads: int, slots: int | None = None, seed: int = 0, width: int = WIDTH
) -> dict[str, Any]:
    """Arguments of a scorer whose weights of heads, and of slots, change with the question."""
    draw = np.random.default_rng(seed + 2)
    changes = {
        "components": asdict(components(2, width, seed)),
        "heads": draw.standard_normal((len(layers), heads, 2)).tolist(),
        "slots": None if slots is None else draw.standard_normal((slots, 2)).tolist(),
    }
    plain = {"head_weights": draw.standard_normal((len(layers), heads)).tolist()}
    return {"layers": list(layers), **plain, "question": changes}
