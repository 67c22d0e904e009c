"""What every family knows: where things are in a Hugging Face model, and never a formula."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from catp_lightning.attention import Reduction
from catp_lightning.observation import Observation, Signal, Values

if TYPE_CHECKING:
    from catp_lightning.dropping.prompt import KeptSequence, Prompt

Reads = Literal["decoder", "encoder", "cross-attention"]


@dataclass(frozen=True)
class AttentionSite:
    """An attention module to observe: `owner` is the sub-model whose config says how it attends."""

    owner: PreTrainedModel
    module: nn.Module
    reduction: Reduction


@dataclass(frozen=True)
class OutputSite:
    """A module whose output, or one of whose inputs, is a signal; `read` takes it from (args, kwargs, output)."""

    module: nn.Module
    read: Callable[[tuple[Any, ...], dict[str, Any], Any], Tensor]


class Family(ABC):
    """One kind of vision-language model; bound to one model.

    Attributes:
        name: as a policy records it.
        classes: the Hugging Face classes it is for, as the documentation lists them.
        reads: which part of the language model reads visual tokens: tokens leave there.
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
        """Whether a model is of this family."""

    @abstractmethod
    def check(self) -> None:
        """Raise PruningError where this very model cannot be pruned exactly."""

    def check_use(self, by_image: bool, stages: tuple[int, ...], compact: bool) -> None:  # noqa: B027 - none by default
        """Raise PruningError where a policy asks for what is not possible here, before any prompt comes.

        Args:
            by_image: tokens are scored, and a budget is of each image.
            stages: layers at whose entry tokens leave; none: before the first.
            compact: the rows that stay are numbered anew.
        """

    @abstractmethod
    def shape(self) -> Mapping[str, int]:
        """What a policy depends on: numbers of visual tokens, layers and heads."""

    @property
    @abstractmethod
    def placeholder_ids(self) -> tuple[int, ...]:
        """The ids in `input_ids` that visual tokens take the place of."""

    @property
    @abstractmethod
    def decoder(self) -> nn.Module:
        """The stack of decoder layers, at whose entry tokens are dropped."""

    @property
    def tokens_per_image(self) -> int | None:
        """Visual tokens of each image, where all have as many."""
        return None

    @property
    def most_tokens(self) -> int | None:
        """Visual tokens of the largest image; None: not known."""
        return self.tokens_per_image

    @property
    def has_grid(self) -> bool:
        """Whether an image's tokens are the patches of one square, line by line."""
        return False

    @property
    def replayable(self) -> bool:
        """Whether a recorded prompt can be answered again exactly, as calibration does."""
        return False

    def heads(self, signal: Signal) -> int:
        """How many attention heads a by-layer signal has."""
        return int(self.decoder_config.num_attention_heads)

    @property
    def outer(self) -> nn.Module | None:
        """What turns ids and pixels into the decoder's input in forward and in generate alike; None: nothing does."""
        return None

    @property
    def language_model(self) -> PreTrainedModel:
        """The model with the head that turns the decoder's output into logits, and that generates."""
        return self.model

    @property
    def decoder_config(self) -> PreTrainedConfig:
        """Says how the decoder's layers attend."""
        config: Any = self.decoder.config
        return config

    @property
    def depth(self) -> int:
        """How many layers the decoder has."""
        return int(self.decoder_config.num_hidden_layers)

    @property
    def generation_config(self) -> GenerationConfig:
        return self.language_model.generation_config

    def end_ids(self) -> list[int]:
        """Token ids that end an answer."""
        ends = self.generation_config.eos_token_id
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    def positions(self, mask: Tensor) -> Tensor:
        """The position ids the model makes where it is given none: mask int64 [R, L] -> [R, L] or [3, R, L]."""
        return torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)

    def gather_extras(self, kwargs: Mapping[str, Any], prompt: "KeptSequence") -> dict[str, Any]:
        """Other inputs of the decoder that have a row for each column of the prompt, shortened like it."""
        return {}

    def merge_extras(self, kwargs: Mapping[str, Any], visual: Tensor, carrier: Tensor) -> dict[str, Any]:
        """The same inputs where visual tokens are merged: bool [B, L], int64 [B, T]."""
        return {}

    def check_images(self, visual: Tensor, given: Mapping[str, Any]) -> None:  # noqa: B027
        """Raise PruningError where a prompt has no place for the images that were given, and the model says nothing.

        Args:
            visual: bool [B, L], the placeholders of a prompt.
            given: what the model was called with, by name.
        """

    @abstractmethod
    def layers(self) -> Mapping[Signal, int]:
        """How many layers each by-layer signal has here; one that is not named does not exist here."""

    @property
    @abstractmethod
    def signals(self) -> frozenset[Signal]:
        """The signals without layers that exist here."""

    def shows(self, signals: Iterable[Signal]) -> bool:
        """Whether all of these signals exist here."""
        return set(signals) <= self.signals | self.layers().keys()

    @property
    def at_entry(self) -> frozenset[Signal]:
        """Those of them that are read from the prompt itself, as it reaches the language model."""
        return frozenset()

    @abstractmethod
    def attention_site(self, signal: Signal, layer: int) -> AttentionSite:
        """Where an attention signal is; `layer` is 0 for signals without layers."""

    @abstractmethod
    def output_site(self, signal: Signal) -> OutputSite:
        """Where any other signal is."""

    @abstractmethod
    def observation(self, values: Values, wanted: frozenset[Signal], prompt: "Prompt") -> Observation:
        """What was observed on the way, and `wanted` of the prompt itself, by images or frames."""

    def describe(self) -> dict[str, Any]:
        """Type, name and shape, as a policy records them."""
        name = str(getattr(self.model, "name_or_path", "") or "")
        name = Path(name).name if Path(name).is_dir() else name  # where a folder lies differs between machines
        return {"type": self.name, "name": name, **self.shape()}
