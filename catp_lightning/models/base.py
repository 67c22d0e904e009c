"""Base class of model families: where things are in a Hugging Face model, and never a formula."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from catp_lightning.methods.observation import Observation, Signal
from catp_lightning.models.images import Part
from catp_lightning.prompt.attention import Reduction
from catp_lightning.prompt.kept import KeptSequence
from catp_lightning.prompt.prompt import Prompt

Reads = Literal["decoder", "encoder", "cross-attention"]


@dataclass(frozen=True)
class AttentionSite:
    """Attention module to observe; `owner` is the sub-model whose config names its attention implementation."""

    owner: PreTrainedModel
    module: nn.Module
    reduction: Reduction


@dataclass(frozen=True)
class OutputSite:
    """Module whose output, or one of whose inputs, is a signal; `read` takes it from (args, kwargs, output)."""

    module: nn.Module
    read: Callable[[tuple[Any, ...], dict[str, Any], Any], Tensor]


Runs = Mapping[Signal | tuple[Signal, int], Sequence[Tensor]]
"""Of each signal, or signal and layer, what it was in each forward of its part of the model, the last two at most.

A vision tower runs once for the images of a call, and once more for its videos.
"""


class Family(ABC):
    """Kind of vision-language model, bound to one model.

    Attributes:
        name: name of the family in a policy.
        classes: Hugging Face classes that it is for, as the documentation lists them.
        reads: part of the language model that reads visual tokens; tokens are dropped there.
        model: the model.
    """

    name: str
    classes: ClassVar[tuple[str, ...]]
    reads: Reads = "decoder"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.check()

    @classmethod
    @abstractmethod
    def handles(cls, model: PreTrainedModel) -> bool:
        """Return True if a model is of this family."""

    @abstractmethod
    def check(self) -> None:
        """Raise PruningError if this very model cannot be pruned exactly."""

    def check_use(self, by_image: bool, stages: tuple[int, ...], compact: bool) -> None:  # noqa: B027 - none by default
        """Raise PruningError, before any prompt comes, if a policy asks for what is not possible in this model.

        Args:
            by_image: True if the visual tokens of each image have to be known: they are scored, and a budget is of each
                image.
            stages: layers at whose entry tokens are dropped; empty: before the first.
            compact: True if the rows that stay are numbered anew.
        """

    @abstractmethod
    def shape(self) -> Mapping[str, int]:
        """Return the sizes that a policy depends on: numbers of visual tokens, layers and heads."""

    @property
    @abstractmethod
    def placeholder_ids(self) -> tuple[int, ...]:
        """Ids in `input_ids` that visual tokens take the place of."""

    @property
    @abstractmethod
    def decoder(self) -> nn.Module:
        """Stack of layers, at whose entry tokens are dropped: the language model's decoder, or its encoder (T5)."""

    @property
    def tokens_per_image(self) -> int | None:
        """Number of visual tokens of each image; None if images have different numbers."""
        return None

    @property
    def has_grid(self) -> bool:
        """True if an image's tokens are the patches of one square, line by line."""
        return False

    @property
    def pixel_readers(self) -> tuple[nn.Module, ...]:
        """Modules of the vision part whose argument `pixel_values` is pictures, float [..., C, H, W]; empty: not known.

        What an image's hash is made of is read before it reaches them.
        """
        return ()

    def heads(self, signal: Signal) -> int:
        """Return the number of attention heads of a by-layer signal."""
        return int(self.decoder_config.num_attention_heads)

    @property
    def outer(self) -> nn.Module | None:
        """Module that turns ids and pixels into the decoder's input, in forward and in generate alike, or None."""
        return None

    @property
    def language_model(self) -> PreTrainedModel:
        """Model with the head that turns the decoder's output into logits, and that generates."""
        return self.model

    @property
    def decoder_config(self) -> PreTrainedConfig:
        """Config that says how the decoder's layers attend."""
        config: Any = self.decoder.config
        return config

    @property
    def depth(self) -> int:
        """Number of layers of the decoder."""
        return int(self.decoder_config.num_hidden_layers)

    @property
    def generation_config(self) -> GenerationConfig:
        return self.language_model.generation_config

    def end_ids(self) -> list[int]:
        """Return the token ids that end an answer."""
        ends = self.generation_config.eos_token_id
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    def positions(self, mask: Tensor, past: int = 0) -> Tensor:
        """Return the position ids that the model makes if given none, of the columns from `past` on.

        The mask, int64 [R, past + L], is of all columns -> int64 [R, L], or [3, R, L].
        """
        columns = torch.arange(past, mask.shape[1], dtype=torch.int64, device=mask.device)
        return columns.expand(len(mask), -1)

    @property
    def by_column(self) -> tuple[str, ...]:
        """Names of other inputs of the decoder that have a row for each column of the prompt."""
        return ()

    def inputs_of_text(self, names: Iterable[str], ids: Tensor, embeds: Tensor) -> dict[str, Tensor]:
        """Return those of `by_column` that are in `names`, of text: [R, L, ...].

        Args:
            names: the names.
            ids: int64 [R, L], token ids.
            embeds: float [R, L, D], their embeddings.
        """
        return {}

    def gather_extras(self, kwargs: Mapping[str, Any], prompt: KeptSequence, visual: Tensor) -> dict[str, Any]:
        """Return other inputs of the decoder that have a row for each column of the prompt, shortened like it.

        Args:
            kwargs: arguments of the decoder's call.
            prompt: the columns that stay.
            visual: bool [B, L], placeholders of the prompt.
        """
        return {}

    def merge_extras(self, kwargs: Mapping[str, Any], visual: Tensor, destination: Tensor) -> dict[str, Any]:
        """Return other inputs of the decoder that have a row for each column of the prompt, with visual tokens merged.

        Args:
            kwargs: arguments of the decoder's call.
            visual: bool [B, L], placeholders of the prompt.
            destination: int64 [B, T], for each visual token the one that it is merged into; -1: none.
        """
        return {}

    def check_images(self, visual: Tensor, given: Mapping[str, Any]) -> None:  # noqa: B027
        """Raise PruningError if a prompt has no place for the images that were given and the model itself says nothing.

        Args:
            visual: bool [B, L], placeholders of a prompt.
            given: arguments of the model's call, by name.
        """

    @abstractmethod
    def layers(self) -> Mapping[Signal, int]:
        """Return the number of layers of each by-layer signal; a signal that is not named does not exist here."""

    @property
    @abstractmethod
    def signals(self) -> frozenset[Signal]:
        """Signals without layers that this model has."""

    def shows(self, signals: Iterable[Signal]) -> bool:
        """Return True if this model has all of `signals`."""
        return set(signals) <= self.signals | self.layers().keys()

    @property
    def at_entry(self) -> frozenset[Signal]:
        """Signals that are read from the prompt itself, as it reaches the language model."""
        return frozenset()

    @abstractmethod
    def attention_sites(self, signal: Signal, layer: int) -> Sequence[AttentionSite]:
        """Return the places of an attention signal; `layer` is 0 for signals without layers.

        There are several where images and videos go through towers of their own.
        """

    @abstractmethod
    def output_site(self, signal: Signal) -> OutputSite:
        """Return the place of a signal that is not attention."""

    @abstractmethod
    def observation(self, values: Runs, wanted: frozenset[Signal], prompt: Prompt) -> Observation:
        """Return the signals of one prefill, by images or frames.

        Args:
            values: signals observed on the way to the language model.
            wanted: signals to read from the prompt itself.
            prompt: the prompt as it reaches the language model.
        """

    @abstractmethod
    def parts(self, prompt: Prompt) -> Sequence[Sequence[Part]]:
        """Return the parts of each image of a prompt, with their pixels; images as in `observation`.

        Parts are numbered as in `Signal.PATCH_POSITION`. A model with query tokens has one part for each image: the
        patches that its query tokens attend to.

        Args:
            prompt: the prompt as it reaches the language model.
        """

    def describe(self) -> dict[str, Any]:
        """Return type, name and shape of the model, as a policy records them."""
        name = str(getattr(self.model, "name_or_path", "") or "")
        name = Path(name).name if Path(name).is_dir() else name  # where a folder lies differs between machines
        return {"type": self.name, "name": name, **self.shape()}
