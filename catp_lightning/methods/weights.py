"""Weights of small trained networks as text in a policy: base64 of the format of safetensors, nothing pickled."""

import base64
import binascii
from collections.abc import Mapping

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

Weights = Mapping[str, Tensor]
"""Weights by name."""

Shapes = Mapping[str, tuple[str, ...]]
"""Names of the dimensions of each weight; dimensions of one name have one size."""


def encoded(weights: Weights) -> str:
    """Return weights as text, rounded to float16."""
    plain = {name: weight.detach().to("cpu", torch.float16).contiguous() for name, weight in weights.items()}
    return base64.b64encode(safetensors.torch.save(plain)).decode()


def decoded(text: str) -> dict[str, Tensor]:
    """Return the weights that a text holds.

    Raises:
        ValueError: the text is damaged.
    """
    try:
        return safetensors.torch.load(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError, SafetensorError) as error:
        raise ValueError(f"weights are not base64 of safetensors: {error!s:.200}.") from error


def sizes_of(weights: Weights, shapes: Shapes) -> dict[str, int]:
    """Return the size of each named dimension of float16 weights.

    Raises:
        ValueError: weights are missing or unknown, not finite, of another type, or their sizes contradict each other.
    """
    if weights.keys() != shapes.keys():
        raise ValueError(f"weights are {sorted(weights)!r:.200}; there should be {', '.join(sorted(shapes))}.")
    sizes: dict[str, int] = {}
    for name, dimensions in shapes.items():
        weight = weights[name]
        fits = weight.dim() == len(dimensions) and weight.numel() > 0
        fits = fits and all(
            sizes.setdefault(one, size) == size for one, size in zip(dimensions, weight.shape, strict=True)
        )
        if not fits or weight.dtype != torch.float16 or not bool(weight.isfinite().all()):
            raise ValueError(
                f"{name} of the weights is {weight.dtype} of shape {list(weight.shape)}; it is finite float16 of the "
                f"dimensions {', '.join(dimensions)}, with sizes {sizes} by the other weights."
            )
    return sizes
