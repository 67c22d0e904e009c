"""Base classes of selectors, which choose the tokens to keep from scores and a budget."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.selection import Selection
from catp_lightning.utils.on_cpu import on_cpu


@dataclass(frozen=True)
class Selector:
    """Base class of methods that choose the tokens to keep in each row; a row is an image, or all images of a sample.

    Attributes:
        per: unit of the budget: each "image" or frame of a video; each "crop" or tile (the image where it is not cut);
            or the whole "sample".
        nested: True if a smaller budget keeps a subset of a larger one; such a selector implements `ranks`, any other
            `select`.
        merges: True if other tokens are merged into kept ones: selections have a `destination`.
        compares: True if tokens are compared with each other, which takes memory by the square of their number.
        needs_grid: True if tokens must be the patches of one square image, line by line.
    """

    nested: ClassVar[bool] = True
    merges: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False

    per: Literal["image", "crop", "sample"] = "image"

    @property
    def needs(self) -> Needs:
        """Signals that the selector reads beside the scores, with their layers."""
        return {}

    def vectors(self, seen: Observation) -> Tensor | None:
        """Vectors by which tokens are compared, float [I, T, F features]; None if the selector reads only scores."""
        return None

    def ranks(self, scores: Tensor, visual: Tensor, max_tokens: int, vectors: Tensor | None) -> Tensor:
        """Rank of each token in the order in which tokens are kept: a smaller budget keeps a subset of a larger one.

        Args:
            scores: float [R, T], R rows.
            visual: bool [R, T], True for tokens that exist and may be chosen.
            max_tokens: number of tokens of each row to rank.
            vectors: float [R, T, F], as from `vectors`, or None.

        Returns:
            int64 [R, T]: 0 for the first token kept, 1 for the next; `max_tokens` or more where a token is not ranked.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no `ranks`: a selector that chooses anew at every budget has `select`, and "
            "`nested = False`."
        )

    def select(self, scores: Tensor, visual: Tensor, counts: Tensor, vectors: Tensor | None) -> Selection:
        """Choose the tokens to keep, and where the others are merged.

        Args:
            scores: float [R, T].
            visual: bool [R, T], True for tokens that exist and may be chosen.
            counts: int64 [R], number of tokens to keep, at most the row's own.
            vectors: float [R, T, F], as from `vectors`, or None.

        Returns:
            A selection of `counts` tokens in each row; `union` with budget "head" may keep more, `pool` fewer.
        """
        return Selection(self.ranks(scores, visual, int(on_cpu(counts)[0].max()), vectors) < counts[:, None])


@dataclass(frozen=True)
class FeatureSelector(Selector):
    """Base class of selectors that compare tokens by one signal, in float32 at least.

    Attributes:
        compared: the signal by which tokens are compared, [I, T, D], D features.
    """

    compares: ClassVar[bool] = True
    compared: ClassVar[Signal] = Signal.IMAGE_FEATURES

    @property
    def needs(self) -> Needs:
        return {self.compared: None}

    def vectors(self, seen: Observation) -> Tensor:
        features = seen[self.compared]
        return features.to(torch.promote_types(features.dtype, torch.float32))


def ordered(scores: Tensor, visual: Tensor) -> Tensor:
    """Tokens in the order of their scores, the highest first: float [R, T], bool [R, T] -> int64 [R, T].

    The lowest index wins a tie. NaN comes last among the tokens where `visual` is True; all others come after these.
    """
    key = (-scores).nan_to_num_(torch.inf, torch.inf, -torch.inf).masked_fill_(~visual, torch.nan)  # sorted last
    return key.argsort(dim=1, stable=True)


def ranked(scores: Tensor, visual: Tensor) -> Tensor:
    """Place of each token in the order of `ordered`, 0 for the highest score: [R, T], bool [R, T] -> int64 [R, T]."""
    order = ordered(scores, visual)
    places = torch.arange(order.shape[1], dtype=torch.int64, device=order.device)
    return torch.empty_like(order).scatter_(1, order, places.expand_as(order))
