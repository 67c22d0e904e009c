"""Network that estimates what a visual token is worth to a question: two hidden layers, some thousand weights."""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from catp_lightning.methods.components import Features, Question
from catp_lightning.methods.observation import Observation
from catp_lightning.utils.on_cpu import on_device_as

Weights = Mapping[str, Tensor]
"""Weights by name, in the shapes of `SHAPES`."""

SHAPES = {
    "features": ("hidden", "features"),
    "question": ("hidden", "question"),
    "place": ("slots", "hidden"),
    "hidden": ("hidden", "hidden"),
    "bias": ("hidden",),
    "out": ("hidden",),
    "slots": ("slots",),
}
"""Dimensions of each weight: components of a token and of a question, hidden units, and slots (1: all alike)."""


@dataclass(frozen=True)
class Network:
    """Trained network, with all that it reads.

    Attributes:
        features: components of a token's features.
        question: components of the prompt's text.
        weights: base64 of the weights in the format of safetensors, float32.

    Raises:
        ValueError: the weights are damaged, or for other numbers of components.
    """

    features: Features
    question: Question
    weights: str

    def __post_init__(self) -> None:
        self._decoded  # noqa: B018  # damage is found now

    @classmethod
    def of(cls, features: Features, question: Question, weights: Weights) -> "Network":
        """Encode weights of any floating dtype."""
        plain = {name: weights[name].detach().to("cpu", torch.float32).contiguous() for name in SHAPES}
        return cls(features, question, base64.b64encode(safetensors.torch.save(plain)).decode())

    def worth(self, seen: Observation) -> Tensor:
        """Return what each token of each image is worth: float [I, T].

        Raises:
            ValueError: it was trained for another model.
        """
        features = self.features.components(seen)
        weights = {name: on_device_as(features, value) for name, value in self._decoded.items()}
        return worth(weights, features, self.question.components(seen).to(features))

    @cached_property
    def _decoded(self) -> Weights:
        try:
            found = safetensors.torch.load(base64.b64decode(self.weights, validate=True))
        except (binascii.Error, ValueError, SafetensorError) as error:
            raise ValueError(f"weights are not base64 of safetensors: {error!s:.200}.") from error
        if found.keys() != SHAPES.keys() or found["place"].dim() != 2:
            raise ValueError(f"weights are {sorted(found)!r:.200}; a network has {', '.join(sorted(SHAPES))}.")
        wanted = shapes(self.features.count, self.question.count, *found["place"].shape)
        for name, shape in wanted.items():
            if found[name].shape != shape or found[name].dtype != torch.float32 or not found[name].isfinite().all():
                raise ValueError(
                    f"{name} of the weights is {found[name].dtype} of shape {list(found[name].shape)}; it is finite "
                    f"float32 of shape {list(shape)}, for {self.features.count} components of a token and "
                    f"{self.question.count} of a question."
                )
        return found


def worth(weights: Weights, features: Tensor, question: Tensor) -> Tensor:
    """Return what each token is worth: float [I, T, F] and [I, C] -> float [I, T].

        h1 = relu(features x + question q + place[s]),  h2 = relu(hidden h1 + bias),  worth = out . h2 + slots[s]

    for a token with components x in slot s of an image that is asked the question with components q.

    Raises:
        ValueError: the network knows several slots, and the images have another number of tokens.
    """
    tokens, slots = features.shape[1], len(weights["slots"])
    if slots not in (1, tokens):
        raise ValueError(f"the network knows {slots} slots; an image of this model has {tokens} tokens.")
    asked = F.linear(question, weights["question"])[:, None]
    first = F.relu(F.linear(features, weights["features"]) + asked + weights["place"])
    second = F.relu(F.linear(first, weights["hidden"], weights["bias"]))
    return second @ weights["out"] + weights["slots"]


def shapes(features: int, question: int, slots: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight."""
    sizes = {"features": features, "question": question, "slots": slots, "hidden": hidden}
    return {name: tuple(sizes[one] for one in dimensions) for name, dimensions in SHAPES.items()}
