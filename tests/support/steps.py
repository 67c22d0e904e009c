"""Generating, with the logits of every step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def stepwise(model: Any, inputs: Mapping[str, Any], **settings: Any) -> tuple[Any, Tensor]:
    """Return what generate returns, and the logits of every step [rows, steps, V] in the model's own dtype.

    Those that generate itself returns are float32.
    """
    steps: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, args, output: steps.append(output[:, -1]))
    try:
        found = model.generate(**inputs, **settings)
    finally:
        hook.remove()
    return found, torch.stack(steps, 1)


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()
