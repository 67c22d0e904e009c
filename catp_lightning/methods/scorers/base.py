"""Base classes of scorers: frozen dataclasses whose one method is the equation of their paper."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from catp_lightning.methods.budget import even_counts
from catp_lightning.methods.observation import Needs, Observation
from catp_lightning.utils.on_cpu import on_device


@dataclass(frozen=True)
class Scorer(ABC):
    """Base class of methods that score visual tokens; a token with a higher score is kept sooner.

    Attributes:
        selector: name of the selector this method uses unless the policy names another.
        control: True if the method is a control, which any real method must beat; it is not a finding of a calibration.
        published: True if its authors publish the rule as a method; a control may be one too.
    """

    selector: ClassVar[str] = "top-k"
    control: ClassVar[bool] = False
    published: ClassVar[bool] = True

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """Signals that `score` reads, with their layers."""

    @property
    def adaptive(self) -> bool:
        """True if how many tokens stay depends on the prompt, not on the budget alone."""
        return False

    def stages(self, depth: int) -> tuple[int, ...]:
        """Layers of a decoder of `depth` layers at whose entry tokens are scored and dropped; empty: before layer 0."""
        return ()

    def stage_counts(self, keep: int | float, tokens: Tensor, stage: int, stages: int, seen: Observation) -> Tensor:
        """Number of tokens of each sample that stay after a stage, int64 [B]; every stage drops the same share.

        Args:
            keep: the budget that holds after the last stage.
            tokens: int64 [B], number of tokens of each of B samples before the first stage.
            stage: number of the stage, from 0.
            stages: number of stages.
            seen: the signals at the stage.
        """
        return even_counts(keep, tokens, (stage + 1) / stages)

    @abstractmethod
    def score(self, seen: Observation) -> Tensor:
        """Scores of the tokens of every image: float [I, T], I images of at most T tokens."""


@dataclass(frozen=True)
class EqualScores(Scorer):
    """Base class of methods that score all tokens 0, so that their selector alone decides which are kept."""

    @property
    def needs(self) -> Needs:
        return {}

    def score(self, seen: Observation) -> Tensor:
        return torch.zeros(seen.valid.shape, dtype=torch.float32, device=seen.valid.device)


@dataclass(frozen=True)
class AttentionScorer(Scorer):
    """Base class of scorers that sum weighted head scores: one number for each token from each attention head.

    Attributes of the class:
        fitted: True if a calibration of all methods fits weights for the heads of this one, on every model that has the
            attention it reads; it holds for this very class, not for those derived from it. A calibration of one method
            by name fits the heads of any scorer.

    Attributes:
        layers: the layers that are read, counted from 0, or from -1 for the last; None: all.
        head_weights: [L, H], a weight for each head of each of those L layers, which may be negative; None: all 1.
        slot_weights: [T], a number for each token of an image, added to the sum of the head scores; None: all 0.
    """

    fitted: ClassVar[bool] = False

    layers: tuple[int, ...] | None = None
    head_weights: tuple[tuple[float, ...], ...] | None = None
    slot_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.layers is not None and not self.layers:
            raise ValueError("layers is empty: name at least one layer, or None for all.")
        if self.head_weights is not None:
            if len({len(row) for row in self.head_weights}) != 1:
                raise ValueError("head_weights needs rows of equal length, a number for each head.")
            if self.layers is not None and len(self.head_weights) != len(self.layers):
                raise ValueError(f"head_weights has {len(self.head_weights)} rows for {len(self.layers)} layers.")

    @abstractmethod
    def head_scores(self, seen: Observation) -> Tensor:
        """Score that each of H heads in L layers gives each token: float [I, L, H, T]."""

    def score(self, seen: Observation) -> Tensor:
        head_scores = self.head_scores(seen)
        scores = weigh(head_scores, self.weights(head_scores))
        if self.slot_weights is not None:
            scores = scores + slot_scores(self.slot_weights, scores)
        return scores

    def weights(self, head_scores: Tensor) -> Tensor | None:
        """Return `head_weights` as a tensor [L, H] of the scores' dtype, on their device; None if there are none."""
        if self.head_weights is None:
            return None
        return torch.tensor(self.head_weights, dtype=head_scores.dtype, device=head_scores.device)


@dataclass(frozen=True)
class PaidAttention(AttentionScorer):
    """Base class of scorers whose head scores are the attention that a token gets.

    Attributes:
        scale: "attention", the probabilities; or "log", their logarithm, standardised over the tokens of an image: the
            scale on which calibration fits head weights.
    """

    scale: Literal["attention", "log"] = "attention"

    @abstractmethod
    def attention(self, seen: Observation) -> Tensor:
        """Attention that each token gets from each of H heads in L layers: float [I, L, H, T]."""

    def head_scores(self, seen: Observation) -> Tensor:
        attention = self.attention(seen)
        return attention if self.scale == "attention" else standardised_log(attention, seen.droppable)


def standardised_log(attention: Tensor, droppable: Tensor) -> Tensor:
    """Log attention with mean 0 and standard deviation 1 over an image's droppable tokens, as float [I, L, H, T].

    Tokens that are not droppable get 0, and so do all tokens of an image whose attention is equal everywhere.

    Args:
        attention: float [I, L, H, T]; values below 1e-20 count as 1e-20.
        droppable: bool [I, T].

    >>> there = torch.tensor([[True, True, False]])
    >>> standardised_log(torch.tensor([[[[1.0, 10.0, 0.0]]]]), there)[..., :2].flatten().round()
    tensor([-1.,  1.])
    """
    there = droppable[:, None, None].to(attention.dtype)
    logs, count = attention.clamp(min=1e-20).log() * there, there.sum(-1, keepdim=True).clamp(min=1)
    centred = (logs - logs.sum(-1, keepdim=True) / count) * there
    return centred / (centred.square().sum(-1, keepdim=True) / count).sqrt().clamp(min=1e-6)


def slot_scores(weights: Sequence[float], like: Tensor) -> Tensor:
    """Scores by slot, the place of a token in its image: T weights -> float [I, T], with dtype and device of `like`.

    Raises:
        ValueError: the images have another number of tokens than there are weights.
    """
    if len(weights) != like.shape[1]:
        raise ValueError(f"there are {len(weights)} slot weights; an image of this model has {like.shape[1]} tokens.")
    return on_device(torch.tensor(weights, device="cpu", dtype=like.dtype), like.device).expand_as(like)


def weigh(head_scores: Tensor, head_weights: Tensor | None = None) -> Tensor:
    """Sum of head scores over layers and heads, weighted if weights are given: [I, L, H, T], [L, H] or None -> [I, T].

    Raises:
        ValueError: `head_weights` is not of the shape [L, H] of the head scores.
    """
    if head_weights is None:
        return head_scores.sum((1, 2))
    if head_weights.shape != head_scores.shape[1:3]:
        raise ValueError(
            f"head_weights has shape {tuple(head_weights.shape)}; the scores come from {head_scores.shape[1]} layers "
            f"of {head_scores.shape[2]} heads."
        )
    return torch.einsum("blht,lh->bt", head_scores, head_weights.to(head_scores))
