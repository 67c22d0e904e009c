"""What every scorer is: a frozen dataclass whose one method is the equation of its paper."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from catp_lightning.counts import even_counts
from catp_lightning.observation import Needs, Observation


@dataclass(frozen=True)
class Scorer(ABC):
    """Ranks visual tokens; the higher, the sooner kept.

    Attributes:
        selector: name of the selector this method uses unless the policy names another.
        control: whether the method is a control that any real method must beat, and no finding of a calibration.
        published: whether it is a rule that its authors publish as a method: a control may be one too.
    """

    selector: ClassVar[str] = "top-k"
    control: ClassVar[bool] = False
    published: ClassVar[bool] = True

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """The signals `score` reads, with their layers."""

    def stages(self, depth: int) -> tuple[int, ...]:
        """Layers of a decoder of `depth` layers at whose entry tokens are scored and leave; none: before the first."""
        return ()

    def stage_counts(self, keep: int | float, tokens: Tensor, stage: int, stages: int, seen: Observation) -> Tensor:
        """How many of each sample's `tokens`, int64 [B], stay after a stage; each stage drops as large a share.

        Args:
            keep: the budget, of what is left after the last stage.
            tokens: how many the sample had before the first.
            stage: number of the stage, 0 for the first of `stages`.
            seen: what is observed there.
        """
        return even_counts(keep, tokens, (stage + 1) / stages)

    @abstractmethod
    def score(self, seen: Observation) -> Tensor:
        """Scores of every image's tokens: float [I, T]."""


@dataclass(frozen=True)
class EqualScores(Scorer):
    """A method that ranks no token above another: what stays is its selector's to say."""

    @property
    def needs(self) -> Needs:
        return {}

    def score(self, seen: Observation) -> Tensor:
        return torch.zeros(seen.valid.shape, dtype=torch.float32, device=seen.valid.device)


@dataclass(frozen=True)
class AttentionScorer(Scorer):
    """A scorer that is a weighted sum of votes, one number for each token from each attention head.

    Attributes:
        layers: the layers that vote, counted from 0, or from -1 for the last; None: all.
        head_weights: a row for each of those layers, a number for each head, negative ones too; None: all equal.
        slot_weights: a number for each token of an image, added to what the heads say; None: none.
    """

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
    def votes(self, seen: Observation) -> Tensor:
        """One number a head: float [I, L, H, T]."""

    def score(self, seen: Observation) -> Tensor:
        votes = self.votes(seen)
        scores = weigh(votes, self.weights(votes))
        return scores if self.slot_weights is None else scores + slot_scores(self.slot_weights, scores)

    def weights(self, votes: Tensor) -> Tensor | None:
        """`head_weights` as a tensor [L, H] like the votes."""
        if self.head_weights is None:
            return None
        return torch.tensor(self.head_weights, dtype=votes.dtype, device=votes.device)


@dataclass(frozen=True)
class PaidAttention(AttentionScorer):
    """Votes that are attention a token is paid: as it is, or on the scale on which calibration fits head weights.

    Attributes:
        scale: "attention", probabilities; or "log", their logarithm, standardised over the tokens of an image.
    """

    scale: Literal["attention", "log"] = "attention"

    @abstractmethod
    def attention(self, seen: Observation) -> Tensor:
        """What each head pays each token: float [I, L, H, T]."""

    def votes(self, seen: Observation) -> Tensor:
        attention = self.attention(seen)
        return attention if self.scale == "attention" else standardised_log(attention, seen.droppable)


def standardised_log(attention: Tensor, droppable: Tensor) -> Tensor:
    """Logarithms with mean 0 and standard deviation 1 over an image's tokens: [I, L, H, T], bool [I, T] -> same.

    Where `droppable` is False they are 0; equal ones are 0 too. Attention below 1e-20 counts as that.

    >>> there = torch.tensor([[True, True, False]])
    >>> standardised_log(torch.tensor([[[[1.0, 10.0, 0.0]]]]), there)[..., :2].flatten().round()
    tensor([-1.,  1.])
    """
    there = droppable[:, None, None].to(attention.dtype)
    logs, count = attention.clamp(min=1e-20).log() * there, there.sum(-1, keepdim=True).clamp(min=1)
    centred = (logs - logs.sum(-1, keepdim=True) / count) * there
    return centred / (centred.square().sum(-1, keepdim=True) / count).sqrt().clamp(min=1e-6)


def slot_scores(weights: Sequence[float], like: Tensor) -> Tensor:
    """What each slot, the place of a token in its image, is worth: T numbers -> float [I, T] as `like`.

    Raises:
        ValueError: an image has another number of tokens.
    """
    if len(weights) != like.shape[1]:
        raise ValueError(f"there are {len(weights)} slot weights; an image of this model has {like.shape[1]} tokens.")
    return torch.tensor(weights, device=like.device, dtype=like.dtype).expand_as(like)


def weigh(votes: Tensor, head_weights: Tensor | None = None) -> Tensor:
    """Sum over layers and heads: float [I, L, H, T], [L, H] or None -> [I, T].

    Raises:
        ValueError: the weights have another shape than the votes' layers and heads.
    """
    if head_weights is None:
        return votes.sum((1, 2))
    if head_weights.shape != votes.shape[1:3]:
        raise ValueError(
            f"head_weights has shape {tuple(head_weights.shape)}; the votes come from {votes.shape[1]} layers of "
            f"{votes.shape[2]} heads."
        )
    return torch.einsum("blht,lh->bt", votes, head_weights.to(votes))
