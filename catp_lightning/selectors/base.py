"""What every selector is: scores and a budget in, the tokens to keep out."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from catp_lightning.observation import Needs, Observation


@dataclass(frozen=True)
class Selector(ABC):
    """Chooses which tokens of each row stay; a row is an image, or all images of a sample.

    Attributes:
        per: what the budget is for: each "image" or frame of a video; each "crop" or tile (the image where it is not
            cut); or all of a "sample".
    """

    per: Literal["image", "crop", "sample"] = "image"

    @property
    def needs(self) -> Needs:
        """Signals read beyond the scores."""
        return {}

    def vectors(self, seen: Observation) -> Tensor | None:
        """What tokens are compared by, if they are: float [I, T, F]."""
        return None

    @abstractmethod
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

    def select(self, scores: Tensor, visual: Tensor, counts: Tensor, vectors: Tensor | None) -> Tensor:
        """Which tokens stay; arguments as `ranks`.

        Args:
            counts: int64 [R], how many to keep, at least 1 and at most the row's own.

        Returns:
            bool [R, T], exactly `counts` True in each row.
        """
        return self.ranks(scores, visual, int(counts.max()), vectors) < counts[:, None]


def keep_count(keep: int | float, tokens: int) -> int:
    """How many of `tokens` a budget keeps: a share is rounded up; at least 1, at most all.

    >>> keep_count(0.25, 32), keep_count(0.1, 30), keep_count(100, 32), keep_count(0.001, 32)
    (8, 3, 32, 1)
    """
    wanted = keep if isinstance(keep, int) else math.ceil(keep * tokens - 1e-9)  # 0.07 * 100 is 7.000000000000001
    return min(tokens, max(1, wanted))


def without_autocast(like: Tensor) -> torch.autocast:
    """While inside: autocast would round weighted sums and similarities to half precision, and ties would decide."""
    return torch.autocast(like.device.type, enabled=False)


def ranked(scores: Tensor, visual: Tensor) -> Tensor:
    """Rank of each token, 0 the highest: [R, T] -> int64 [R, T]. The lowest index wins a tie; NaN ranks last."""
    order = scores.masked_fill(~visual | scores.isnan(), -torch.inf).argsort(dim=1, descending=True, stable=True)
    return order.argsort(1)
