"""Signals that a prefill shows about its visual tokens: plain tensors, the only thing scorers and selectors see."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

import torch
from torch import Tensor

from catp_lightning.utils.on_cpu import of_known, on_cpu, on_device, taken


class Signal(Enum):
    """Signal to observe. I images or frames, H heads, T tokens of an image, N patches (with [CLS]), D features.

    The prompt's text rows, R of them, are those after the sample's first visual token; all text rows if none is after
    it. The answer does not belong to the prompt: neither what follows from the first label on nor what has been
    generated.
    """

    CROSS_ATTENTION = "cross-attention maps, by layer: [I, H, T, N], each row sums to 1"
    SELF_ATTENTION = "self-attention a token receives, summed over query rows, by layer: [I, H, T]"
    VISION_ATTENTION_RECEIVED = (
        "attention an image patch receives in the vision tower's last block, over heads and rows: [I, N]"
    )
    VISION_ATTENTION = (
        "attention a token's patches get in the vision tower, by layer: from [CLS], or received: [I, H, T]; their mean"
    )
    VISION_KEYS = "key vectors in the vision tower, by layer: [I, D, T], mean over heads and over a token's patches"
    CROSS_ATTENTION_TO_IMAGE = (
        "attention a token gets from the text in a cross-attention layer of the language model: [I, H, T]"
    )
    LAST_TOKEN_ATTENTION = "attention a token gets from the prompt's last row in a layer of the decoder: [I, H, T]"
    TEXT_TO_IMAGE_ATTENTION = (
        "attention a token gets from each text row of the prompt in a layer of the decoder: [I, H, R, T]"
    )
    HIDDEN_STATES = "the token as it enters the decoder layer where tokens leave: [I, T, D]"
    IMAGE_EMBEDS = "the token as the language model reads it: [I, T, D]"
    TEXT_EMBEDS = "the prompt's text rows as the language model reads them, those in `Observation.text`: [I, R, D]"
    TEXT_STATES = (
        "the prompt's text rows, those in `Observation.text`, as they enter the layer where tokens leave: [I, R, D]"
    )
    QUESTION = "mean of the prompt's text rows as the language model reads them: [I, D], float32 or float64"
    GUIDE_ATTENTION = (
        "attention a token gets in a guide model from the prompt's text and the answer, by layer: [I, H, T]"
    )
    VISION_STATES = "the token's patch as the vision tower hands it to the projector: [I, D, T]"
    TEXT_RELEVANCE = (
        "cosine of the token's patch and the prompt's text in the space of a text encoder beside the model, mean over "
        "the text's segments: [I, T]; 0 without text"
    )
    IMAGE_FEATURES = "the token as it leaves the vision part: [I, T, D]"
    PATCH_POSITION = (
        "part (crop, tile), row and column of a token's patch, -1 for a row where it is none: int64 [I, T, 3]"
    )
    IMAGE_HASH = "a checksum of the image's pixels: int64 [I]"


BY_LAYER = frozenset(
    {
        Signal.CROSS_ATTENTION,
        Signal.SELF_ATTENTION,
        Signal.VISION_ATTENTION,
        Signal.CROSS_ATTENTION_TO_IMAGE,
        Signal.LAST_TOKEN_ATTENTION,
        Signal.TEXT_TO_IMAGE_ATTENTION,
        Signal.VISION_KEYS,
        Signal.GUIDE_ATTENTION,
    }
)
BESIDE = frozenset({Signal.GUIDE_ATTENTION, Signal.TEXT_RELEVANCE})
"""Signals that come from a model beside the one that is pruned."""
STAGED = frozenset(
    {
        Signal.LAST_TOKEN_ATTENTION,
        Signal.TEXT_TO_IMAGE_ATTENTION,
        Signal.HIDDEN_STATES,
        Signal.IMAGE_EMBEDS,
        Signal.TEXT_EMBEDS,
        Signal.TEXT_STATES,
    }
)
"""Signals that can be observed where tokens are dropped inside a decoder.

Their layers are those that have run, -1 the last of them.
"""

Needs = Mapping[Signal, tuple[int, ...] | None]
"""Signals that a method reads and, for a signal that has layers, the layers.

None stands for all layers; negative numbers count from the last.
"""


def join(needs: Iterable[Needs]) -> dict[Signal, tuple[int, ...] | None]:
    """Return the union of what several methods need."""
    joined: dict[Signal, tuple[int, ...] | None] = {}
    for need in needs:
        for signal, layers in need.items():
            old = joined.get(signal, ())
            joined[signal] = None if layers is None or old is None else tuple(sorted({*old, *layers}))
    return joined


@dataclass
class Observation:
    """Signals of one prefill; I images or frames, T tokens of the largest, R text rows.

    Attributes:
        valid: bool [I, T], the tokens that each image, or frame of a video, has. Read row by row they are the visual
            tokens of the batch in the order of their placeholders.
        layers: number of layers that each by-layer signal has in this model.
        values: the tensors observed, by signal, or by signal and layer.
        protected: bool [I, T], tokens that always stay: they stand for no patch (a line's end, a frame's [CLS]), or are
            the last row of a prompt; None: there are none.
        crops: int64 [I, T], the crop of its image that each token is of; None if images are not cut.
        text: bool [I, R], True for real rows of `Signal.TEXT_EMBEDS`, `Signal.TEXT_STATES` and
            `Signal.TEXT_TO_IMAGE_ATTENTION`; None if none was observed.
        factors: float [I], the number of tokens that each image keeps, as a multiple of the budget; None: all keep what
            the budget says.
        made: what was made of signals that are the same at all stages of a prefill, by name, as in `once`.
    """

    valid: Tensor
    layers: Mapping[Signal, int]
    values: dict[Signal | tuple[Signal, int], Tensor] = field(default_factory=dict)
    protected: Tensor | None = None
    crops: Tensor | None = None
    text: Tensor | None = None
    factors: Tensor | None = None
    made: dict[str, Tensor] = field(default_factory=dict, kw_only=True)

    @classmethod
    def of_equal(cls, images: int, tokens: int, layers: Mapping[Signal, int], values: "Values") -> "Observation":
        """Return an observation of `images` images that all have `tokens` tokens."""
        device = next((value.device for value in values.values()), None)
        valid = torch.ones(images, tokens, dtype=torch.bool, device="cpu")
        return cls(valid if device is None else on_device(valid, device), layers, values)

    @property
    def images(self) -> int:
        return self.valid.shape[0]

    @property
    def tokens(self) -> int:
        """Number of tokens of the largest image."""
        return self.valid.shape[1]

    @property
    def droppable(self) -> Tensor:
        """Tokens that may be dropped: bool [I, T]."""
        return self.valid if self.protected is None else of_known(lambda a, b: a & ~b, self.valid, self.protected)

    def protecting(self, tokens: Tensor) -> "Observation":
        """Return the same signals with more protected tokens: bool [N], of all visual tokens in their order."""
        (tokens,) = on_cpu(tokens)
        if not bool(tokens.any()):
            return self
        (valid,) = on_cpu(self.valid)
        more = torch.zeros_like(valid)
        more[valid] = tokens
        protected = on_device(more, self.valid.device)
        if self.protected is not None:
            protected = of_known(torch.logical_or, self.protected, protected)
        return replace(self, protected=protected)

    def of_images(self, index: Tensor) -> "Observation":
        """Return the same signals of the images where `index`, bool [I], is True, or with these numbers, int64."""
        return self.each(lambda part: taken(part, index) if index.dtype == torch.bool else part[index])

    def each(self, change: Callable[[Tensor], Tensor]) -> "Observation":
        """Return the observation with `change` applied to every tensor; each has a row for each image."""
        values = {key: change(value) for key, value in self.values.items()}
        parts = (self.protected, self.crops, self.text, self.factors)
        more = (None if part is None else change(part) for part in parts)
        return Observation(change(self.valid), self.layers, values, *more)

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Return what `make` returns; at later stages of the prefill it is not called again."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def __getitem__(self, signal: Signal) -> Tensor:
        """Return a signal that has no layers."""
        return self.values[signal]

    def by_layer(self, signal: Signal, layers: tuple[int, ...] | None = None) -> Tensor:
        """Return a by-layer signal of the layers named, None for all, stacked: [I, L, ...]."""
        count = self.layers[signal]
        chosen = range(count) if layers is None else layers
        return torch.stack([self.values[signal, layer % count] for layer in chosen], 1)


Values = dict[Signal | tuple[Signal, int], Tensor]
