"""What a prefill shows about its visual tokens: plain tensors, the only thing scorers and selectors see."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor


class Signal(Enum):
    """Something to observe. I images, H heads, T tokens of an image, N image patches (with [CLS]), D features."""

    CROSS_ATTENTION = "cross-attention maps, by layer: [I, H, T, N], each row sums to 1"
    SELF_ATTENTION = "self-attention a token receives, summed over query rows, by layer: [I, H, T]"
    IMAGE_RECEIVED = "attention an image patch receives in the vision tower's last block, over heads and rows: [I, N]"
    OUTPUTS = "the token as it leaves the vision part, before projection: [I, T, D]"
    FINGERPRINT = "a checksum of the image's pixels: int64 [I]"


BY_LAYER = frozenset({Signal.CROSS_ATTENTION, Signal.SELF_ATTENTION})

Needs = Mapping[Signal, tuple[int, ...] | None]
"""Which signals a method reads and, where a signal has layers, which: None for all, negative counts from the last."""


def join(needs: Iterable[Needs]) -> dict[Signal, tuple[int, ...] | None]:
    """All that any of several methods needs."""
    joined: dict[Signal, tuple[int, ...] | None] = {}
    for need in needs:
        for signal, layers in need.items():
            old = joined.get(signal, ())
            joined[signal] = None if layers is None or old is None else tuple(sorted({*old, *layers}))
    return joined


@dataclass
class Observation:
    """The signals of one prefill.

    Attributes:
        images: number of images, I.
        tokens: visual tokens of each image, T.
        layers: how many layers each by-layer signal has in this model.
        values: the tensors observed, by signal, or by signal and layer.
    """

    images: int
    tokens: int
    layers: Mapping[Signal, int]
    values: dict[Signal | tuple[Signal, int], Tensor] = field(default_factory=dict)

    def of_images(self, index: Tensor) -> "Observation":
        """The same signals of some of the images: bool [I]."""
        values = {key: value[index] for key, value in self.values.items()}
        return Observation(int(index.sum()), self.tokens, self.layers, values)

    def __getitem__(self, signal: Signal) -> Tensor:
        """A signal without layers."""
        return self.values[signal]

    def by_layer(self, signal: Signal, layers: tuple[int, ...] | None = None) -> Tensor:
        """A by-layer signal of some layers, None for all, stacked: [I, L, ...]."""
        count = self.layers[signal]
        chosen = range(count) if layers is None else layers
        return torch.stack([self.values[signal, layer % count] for layer in chosen], 1)
