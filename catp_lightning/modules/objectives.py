"""What `CompressorTraining` trains: a compressor's rows, or when all visual tokens leave; the model is frozen."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from catp_lightning.calibration.replay.base import agreement, divergence
from catp_lightning.calibration.replay.decoder import DecoderReplay
from catp_lightning.errors import PolicyError, PruningError
from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.scorers import Compressor, DyVTE, Trained
from catp_lightning.methods.selection import Selection, images_to_samples
from catp_lightning.methods.weights import Weights
from catp_lightning.models import Family
from catp_lightning.pruning.sites import PruneAtDecoderLayers, SiteSettings


@dataclass
class Objective(ABC):
    """What is trained, and on what; B samples.

    Attributes:
        family: family of the frozen model.
        scorer: the method, without weights.
        sizes: sizes of its weights' dimensions.
        quality: what `agreed` of `compare` means, as the name of a logged figure.
    """

    quality: ClassVar[str]

    family: Family
    scorer: Any
    sizes: dict[str, int]

    @property
    def before(self) -> Needs:
        """Signals to observe before the decoder."""
        return {}

    @abstractmethod
    def compare(self, weights: Weights, replay: DecoderReplay, seen: Observation) -> tuple[Tensor, Tensor]:
        """Return the loss of each sample, float [B], with gradients to the weights, and which went well, bool [B].

        Args:
            weights: the weights.
            replay: the prompts, with the unpruned model's answers.
            seen: signals of their images.
        """

    @abstractmethod
    def decided(self, keep: float | None) -> tuple[Trained, int | float]:
        """Return the method, still without weights, and the budget of its policy.

        Raises:
            PolicyError: the method has no such budget.
        """

    def begin_epoch(self) -> None:  # noqa: B027 - most remember nothing
        """Forget what the last epoch showed."""


@dataclass
class Compressing(Objective):
    """A compressor's rows: the answer's divergence, KL(unpruned || compressed), mean over its tokens."""

    quality = "agreement"
    scorer: Compressor

    @classmethod
    def of(cls, scorer: type[Compressor], name: str, family: Family, tokens: int | None, width: int) -> "Compressing":
        if type(tokens) is not int or tokens < 1:
            raise PolicyError(
                f"tokens is {tokens!r:.100}; {name!r} writes a number of tokens an image, an int of at least 1."
            )
        try:
            sizes = scorer.sizes_for(int(family.decoder_config.hidden_size), width, tokens)
        except ValueError as error:
            raise PolicyError(f"{name}: {error}") from error
        return cls(family, scorer(tokens=tokens, on_grid=family.shows({Signal.PATCH_POSITION})), sizes)

    @property
    def before(self) -> Needs:
        return self.scorer.needs

    def compare(self, weights: Weights, replay: DecoderReplay, seen: Observation) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            full = replay.log_probabilities(replay.tokens)
        rows = images_to_samples(self.scorer.written(seen, weights), seen.valid, replay.tokens, 0.0)
        keep = images_to_samples(self.scorer.stay(seen, self.sizes), seen.valid, replay.tokens, False)
        short = replay.log_probabilities(keep, rows=rows)
        return divergence(full, short, replay.answers.valid), agreement(full, short, replay.answers.valid)

    def decided(self, keep: float | None) -> tuple[Trained, int | float]:
        assert self.scorer.tokens is not None
        if keep is not None and keep != self.scorer.tokens:
            raise PolicyError(f"keep is {keep}; this compressor is trained for {self.scorer.tokens} tokens an image.")
        return self.scorer, self.scorer.tokens


@dataclass
class Exiting(Objective):
    """When all visual tokens leave: cross-entropy of each layer's likelihood that the answer stays if they leave there.

    Attributes:
        likelihoods: float32 [B, layers] of each batch of the epoch, on the CPU: from them a threshold is found that
            keeps a share of the tokens.
    """

    quality = "told_apart"
    scorer: DyVTE
    likelihoods: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, scorer: type[DyVTE], name: str, family: Family, tokens: int | None, width: int) -> "Exiting":
        if tokens is not None:
            raise PolicyError(
                f"tokens is {tokens!r:.100}; {name!r} lets all visual tokens leave, and policy(keep=...) says how many "
                "of them the layers read on average. Leave tokens out."
            )
        vision = getattr(family.model.config, "vision_config", None)
        first = max(1, len(getattr(vision, "deepstack_visual_indexes", None) or ()))
        if family.depth <= first:
            raise PruningError(
                f"{type(family.model).__name__} has {family.depth} layers, and visual tokens cannot leave before layer "
                f"{first}: there is nothing to choose."
            )
        sizes = scorer.sizes_for(int(family.decoder_config.hidden_size), width, family.depth - first)
        return cls(family, scorer(first=first), sizes)

    def compare(self, weights: Weights, replay: DecoderReplay, seen: Observation) -> tuple[Tensor, Tensor]:
        stages = self.scorer.stages(self.family.depth)
        states: list[Observation] = []

        def remember(prompt: Any) -> Selection:
            states.append(prompt.observation())
            return Selection(prompt.tokens)

        with torch.no_grad():
            settings = SiteSettings(stages, self.scorer.needs)
            full = replay.through(PruneAtDecoderLayers(self.family, remember, settings))
            nothing, valid = torch.zeros_like(replay.tokens), replay.answers.valid
            left = [replace(replay, layer=layer).log_probabilities(nothing) for layer in stages]
            stays = torch.stack([agreement(full, short, valid) for short in left], 1)
        logits = torch.stack([self.scorer.logits(one, stage, weights) for stage, one in enumerate(states)], 1)
        if logits.requires_grad:  # what is validated sets no threshold
            self.likelihoods.append(logits.detach().sigmoid().float().cpu())
        loss = F.binary_cross_entropy_with_logits(logits, stays.to(logits.dtype), reduction="none").mean(1)
        return loss, ((logits > 0) == stays).float().mean(1) > 0.5

    def begin_epoch(self) -> None:
        self.likelihoods.clear()

    def decided(self, keep: float | None) -> tuple[Trained, int | float]:
        threshold = self.scorer.threshold if keep is None else self._threshold(keep)
        return replace(self.scorer, threshold=threshold), 0.5 if keep is None else keep

    def _threshold(self, keep: float) -> float:
        """Return the highest threshold at which layers read at most a share `keep` of the tokens, on the last epoch."""
        if not self.likelihoods or not 0 < keep < 1:
            raise PolicyError(
                f"keep is {keep}, a share of the tokens that layers read on average, between 0 and 1; it is reached by "
                "the last epoch's likelihoods, of which there are "
                f"{sum(map(len, self.likelihoods))}. Train first, in this process; or leave keep out."
            )
        found, depth = torch.cat(self.likelihoods), self.family.depth
        layers = torch.tensor([*self.scorer.stages(depth), depth], dtype=torch.float32, device="cpu")
        values = [0.0, *found.flatten().unique().tolist(), 1.0]

        def share(threshold: float) -> float:
            leaves = torch.cat([found >= threshold, torch.ones(len(found), 1, dtype=torch.bool, device="cpu")], 1)
            return float(layers[leaves.int().argmax(1)].mean()) / depth

        low, high = 0, len(values) - 1  # the share grows with the threshold
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if share(values[middle]) <= keep else (low, middle - 1)
        return values[low]
