"""What every selector is: scores and a budget in, the tokens to keep out."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from catp_lightning.observation import Needs, Observation, Signal


@dataclass(frozen=True)
class Selector:
    """Chooses which tokens of each row stay; a row is an image, or all images of a sample.

    Attributes:
        per: what the budget is for: each "image" or frame of a video; each "crop" or tile (the image where it is not
            cut); or all of a "sample".
        nested: whether a smaller budget keeps a subset of a larger one; those that do write `ranks`, others `select`.
        merges: whether kept tokens carry dropped ones: those write `carriers` too.
        needs_grid: whether tokens must be the patches of one square image, line by line.
    """

    nested: ClassVar[bool] = True
    merges: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False

    per: Literal["image", "crop", "sample"] = "image"

    @property
    def needs(self) -> Needs:
        """Signals read beyond the scores."""
        return {}

    def vectors(self, seen: Observation) -> Tensor | None:
        """What tokens are compared by, if they are: float [I, T, F]."""
        return None

    def ranks(self, scores: Tensor, visual: Tensor, most: int, vectors: Tensor | None) -> Tensor:
        """The order in which tokens join the set, so that a smaller budget keeps a subset of a larger one.

        Args:
            scores: float [R, T].
            visual: bool [R, T], which of them exist.
            most: how many of each row are to be ranked.
            vectors: float [R, T, F], or None.

        Returns:
            int64 [R, T]: 0 for the first token that joins, 1 for the next; `most` or more for those that stay out.
        """
        raise NotImplementedError(f"{type(self).__name__} chooses anew at every budget.")

    def select(self, scores: Tensor, visual: Tensor, counts: Tensor, vectors: Tensor | None) -> Tensor:
        """Which tokens stay; arguments as `ranks`.

        Args:
            counts: int64 [R], how many to keep, at least 1 and at most the row's own.

        Returns:
            bool [R, T], exactly `counts` True in each row.
        """
        return self.ranks(scores, visual, int(counts.max()), vectors) < counts[:, None]

    def carriers(self, keep: Tensor, scores: Tensor, visual: Tensor, vectors: Tensor | None) -> Tensor:
        """Which token's row carries each token on, as the mean of all it carries; other arguments as `ranks`.

        Args:
            keep: bool [R, T], what `select` chose.

        Returns:
            int64 [R, T]: itself for a token that stays, one that stays for a token it carries, -1 for one that is lost.
        """
        raise NotImplementedError(f"{type(self).__name__} merges nothing.")


@dataclass(frozen=True)
class FeatureSelector(Selector):
    """A selector that compares tokens by one of their features, in float32 at least.

    Attributes:
        compared: the signal, [I, T, D].
    """

    compared: ClassVar[Signal] = Signal.IMAGE_FEATURES

    @property
    def needs(self) -> Needs:
        return {self.compared: None}

    def vectors(self, seen: Observation) -> Tensor:
        features = seen[self.compared]
        return features.to(torch.promote_types(features.dtype, torch.float32))


def without_autocast(like: Tensor) -> torch.autocast:
    """While inside: autocast would round weighted sums and similarities to half precision, and ties would decide."""
    return torch.autocast(like.device.type, enabled=False)


def ranked(scores: Tensor, visual: Tensor) -> Tensor:
    """Rank of each token, 0 the highest: [R, T] -> int64 [R, T]. The lowest index wins a tie; NaN ranks last.

    Tokens that are not there rank after all that are.
    """
    order = scores.masked_fill(scores.isnan(), -torch.inf).argsort(dim=1, descending=True, stable=True)
    there = visual.gather(1, order).long().argsort(dim=1, descending=True, stable=True)
    return order.gather(1, there).argsort(1)
