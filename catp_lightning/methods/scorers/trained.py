"""Base classes of methods that are a small trained network: what they read and write, and the weights in a policy."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.regions import Regions, compressed, regions
from catp_lightning.methods.scorers.base import Scorer
from catp_lightning.methods.weights import Shapes, Weights, decoded, encoded, sizes_of
from catp_lightning.utils.on_cpu import of_known, on_device_as, places, taken

HEADS = 4
"""Heads of every attention in these networks."""


@dataclass(frozen=True)
class Trained(Scorer):
    """Base class of methods that are a network, which `CompressorTraining` trains; without weights nothing is pruned.

    Attributes of the class:
        shapes: names of the dimensions of each weight.

    Attributes:
        weights: base64 of the weights in the format of safetensors, float16.

    Raises:
        ValueError: the weights are damaged.
    """

    shapes: ClassVar[Shapes]

    weights: str | None = None

    def __post_init__(self) -> None:
        if self.weights is not None:
            self.check(self.sizes)  # damage is found now

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raise ValueError if the network cannot have these sizes."""

    def with_weights(self, weights: Weights) -> Self:
        """Return the method with weights of any floating type, which are rounded to float16."""
        return replace(self, weights=encoded(weights))

    def weights_like(self, values: Tensor) -> Weights:
        """Return the weights in the type and on the device of `values`.

        Raises:
            ValueError: there are none.
        """
        return {name: on_device_as(values, weight) for name, weight in self._decoded.items()}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Sizes of the dimensions of the weights, by name."""
        return sizes_of(self._decoded, self.shapes)

    @cached_property
    def _decoded(self) -> Weights:
        if self.weights is None:
            raise ValueError(f"{type(self).__name__} has no weights; CompressorTraining trains some.")
        return decoded(self.weights)

    @classmethod
    @abstractmethod
    def initial(cls, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        """Return weights to begin a training with: float32, on the CPU.

        Args:
            sizes: sizes of all dimensions in `shapes`.
            generator: draws them.
        """


@dataclass(frozen=True)
class Compressor(Trained):
    """Base class of compressors: a few rows, computed of all visual tokens and the question, take the tokens' place.

    An image of at most `tokens` tokens is left as it is. Every other one gets `tokens` rows, written at the places of
    as many of its tokens, whose position ids they keep, and with them what Qwen3-VL's first layers add there; all other
    tokens leave. Protected tokens stay as they are. With e_t the token as the language model reads it, x_t = `down`
    LN(e_t), s the root mean square of the image's e_t, and a_kt the attention that row k pays token t,

        row_k = sum_t a_kt e_t + s `up` gelu(`mix` h_k + `bias`)

    so that rows begin as means of the model's own embeddings. Subclasses say what a_kt and h_k are. Their width is
    small (64) beside the model's own, which keeps the weights for a model of 4,096 dimensions within 2 MB.

    Attributes:
        tokens: number of rows, which is the budget of every image.
        on_grid: True if tokens may be patches of a grid, whose signal is then read; False: they are a sequence.

    Raises:
        ValueError: there are weights without `tokens`, or the weights are damaged.
    """

    common: ClassVar[dict[str, tuple[str, ...]]] = {
        "down": ("width", "features"),
        "asked": ("width", "features"),
        "mix": ("width", "width"),
        "bias": ("width",),
        "up": ("features", "width"),
    }

    tokens: int | None = None
    on_grid: bool = False

    @property
    def needs(self) -> Needs:
        needs: Needs = {Signal.IMAGE_EMBEDS: None, Signal.TEXT_EMBEDS: None}
        return {**needs, Signal.PATCH_POSITION: None} if self.on_grid else needs

    def check(self, sizes: Mapping[str, int]) -> None:
        if self.tokens is None or self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}; a compressor with weights writes a number of rows, at least 1.")
        if sizes["width"] % HEADS:
            raise ValueError(f"the weights have a width of {sizes['width']}; it is a multiple of {HEADS}.")

    @classmethod
    @abstractmethod
    def sizes_for(cls, features: int, width: int, tokens: int) -> dict[str, int]:
        """Return the sizes of the weights' dimensions.

        Args:
            features: dimensions of the model's rows.
            width: dimensions in which the compressor computes.
            tokens: number of rows that it writes.
        """

    def further(self, sizes: Mapping[str, int]) -> int:
        """Return the number of rows that belong to no region of the image."""
        return 0

    @abstractmethod
    def rows(
        self, weights: Weights, embeds: Tensor, text: Tensor, asked: Tensor, parts: Regions
    ) -> tuple[Tensor, Tensor]:
        """Return the attention that each row pays each token, float [I, N, T], and h: float [I, N, width].

        Args:
            weights: the weights.
            embeds: float [I, T, width], the x_t.
            text: float [I, R, width], the question's text rows, projected by `asked`.
            asked: bool [I, R], text rows that exist.
            parts: regions of the images, in the order of whose `at` rows are.
        """

    def score(self, seen: Observation) -> Tensor:
        """Return 1 for tokens that stay, 0 for all others: float32 [I, T]."""
        return self.stay(seen, self.sizes).float()

    def stay(self, seen: Observation, sizes: Mapping[str, int]) -> Tensor:
        """Return the tokens that stay, those at whose places rows are written: bool [I, T].

        Args:
            seen: signals of the images.
            sizes: sizes of the weights' dimensions.
        """
        few = compressed(seen, self._tokens)
        found = seen.valid.clone()
        parts = self._regions(seen.of_images(few), sizes)
        protected = of_known(lambda valid, free: valid & ~free, seen.valid, seen.droppable)
        found[places(few, found)] = taken(protected, few).scatter(1, parts.at, True)
        return found

    def written(self, seen: Observation, weights: Weights | None = None) -> Tensor:
        """Return what the language model is to read in the place of each token: float32 or float64 [I, T, D].

        Gradients reach `weights`; None: the method's own. Tokens that leave are as they were.

        Raises:
            ValueError: the weights are for a model of other dimensions.
        """
        embeds = seen[Signal.IMAGE_EMBEDS]
        embeds = embeds.to(torch.promote_types(embeds.dtype, torch.float32))
        weights = self.weights_like(embeds) if weights is None else weights
        pairs = [pair for name, names in self.shapes.items() for pair in zip(names, weights[name].shape, strict=True)]
        sizes = dict(pairs)
        if sizes["features"] != embeds.shape[-1]:
            raise ValueError(
                f"the compressor was trained for rows of {sizes['features']} dimensions; this model's have "
                f"{embeds.shape[-1]}. Train one on this model."
            )
        few = compressed(seen, self._tokens)
        own = seen.of_images(few)
        parts, values = self._regions(own, sizes), taken(embeds, few)
        with torch.autocast(embeds.device.type, enabled=False):
            rows = self._rows(weights, values, own, parts)
        found = embeds.clone()
        found[places(few, found)] = values.scatter(1, parts.at[..., None].expand_as(rows), rows)
        return found

    def _rows(self, weights: Weights, values: Tensor, seen: Observation, parts: Regions) -> Tensor:
        """Return the rows of images, float [I, N, D], whose tokens are `values`, float [I, T, D]."""
        text, asked = seen[Signal.TEXT_EMBEDS].to(values), seen.text
        assert asked is not None  # it comes with the embeddings
        x = F.linear(normed(values), weights["down"]) * parts.own[..., None]
        paid, hidden = self.rows(weights, x, F.linear(normed(text), weights["asked"]), asked, parts)
        square = (values.square().mean(-1) * parts.own).sum(1) / parts.own.sum(1).clamp(min=1)
        change = F.linear(F.gelu(F.linear(hidden, weights["mix"], weights["bias"])), weights["up"])
        return paid @ values + square.sqrt()[:, None, None] * change

    @property
    def _tokens(self) -> int:
        if self.tokens is None:
            raise ValueError(f"{type(self).__name__} has no weights; CompressorTraining trains some.")
        return self.tokens

    def _regions(self, seen: Observation, sizes: Mapping[str, int]) -> Regions:
        further = self.further(sizes)
        return regions(seen, self._tokens - further, further, self.on_grid)


def normed(rows: Tensor) -> Tensor:
    """Return rows with mean 0 and variance 1: float [..., D] of any D."""
    return F.layer_norm(rows, rows.shape[-1:])


def attend(
    query: Tensor, keys: Tensor, values: Tensor, there: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of several heads: what each query reads, float [I, N, width], and pays, float [I, N, T], their mean.

    A query to which nothing is there reads and pays 0.

    Args:
        query: float [I, N, width].
        keys, values: float [I, T, width].
        there: bool [I, T], rows that exist.
        bias: float [I, heads, N, T], added to the logits; None: nothing is.
    """
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (query, keys, values))
    logits = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    logits = logits if bias is None else logits + bias
    some = there.any(1)[:, None, None, None]
    paid = logits.masked_fill(~there[:, None, None], -torch.inf).where(some, 0.0).softmax(-1) * some
    return (paid @ v).transpose(1, 2).flatten(2), paid.mean(1)


def drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw a matrix that keeps the variance of what it multiplies: float32, on the CPU."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") / shape[-1] ** 0.5


def common_weights(sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
    """Return the initial weights that all compressors have; `up` is 0."""
    found = {name: drawn(tuple(sizes[one] for one in names), generator) for name, names in Compressor.common.items()}
    return found | {name: torch.zeros_like(found[name]) for name in ("bias", "up")}
