"""What every family knows: where things are in a Hugging Face model, and never a formula."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from catp_lightning.attention import Reduction
from catp_lightning.observation import Signal


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
    """One kind of vision-language model; bound to one model."""

    name: str

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

    @abstractmethod
    def shape(self) -> Mapping[str, int]:
        """What a policy depends on: numbers of visual tokens, layers and heads."""

    @property
    @abstractmethod
    def image_token_id(self) -> int:
        """The placeholder of a visual token in `input_ids`."""

    @property
    @abstractmethod
    def tokens_per_image(self) -> int:
        """Visual tokens of each image."""

    @property
    @abstractmethod
    def decoder(self) -> nn.Module:
        """The stack of decoder layers, at whose entry tokens are dropped."""

    @property
    def language_model(self) -> PreTrainedModel:
        """The model with the head that turns the decoder's output into logits, and that generates."""
        return self.model

    @property
    def generation_config(self) -> GenerationConfig:
        return self.language_model.generation_config

    def end_ids(self) -> list[int]:
        """Token ids that end an answer."""
        ends = self.generation_config.eos_token_id
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    @abstractmethod
    def positions(self, mask: Tensor) -> Tensor:
        """The position ids the decoder itself makes from a mask: [B, L] -> [B, L]."""

    @abstractmethod
    def layers(self) -> Mapping[Signal, int]:
        """How many layers each by-layer signal has."""

    @abstractmethod
    def attention_site(self, signal: Signal, layer: int) -> AttentionSite:
        """Where an attention signal is; `layer` is 0 for signals without layers."""

    @abstractmethod
    def output_site(self, signal: Signal) -> OutputSite:
        """Where any other signal is."""

    def describe(self) -> dict[str, Any]:
        """Type, name and shape, as a policy records them."""
        name = str(getattr(self.model, "name_or_path", "") or "")
        name = Path(name).name if Path(name).is_dir() else name  # where a folder lies differs between machines
        return {"type": self.name, "name": name, **self.shape()}
