"""Keeps the k highest scores."""

from dataclasses import dataclass

from torch import Tensor

from catp_lightning.methods.selection import Selection
from catp_lightning.methods.selectors.base import Selector, ranked


@dataclass(frozen=True)
class TopK(Selector):
    """Keeps the tokens with the highest scores; where scores are equal the lowest index wins."""

    def ranks(self, scores: Tensor, visual: Tensor, max_tokens: int, vectors: Tensor | None) -> Tensor:
        return ranked(scores, visual)

    def select(self, scores: Tensor, visual: Tensor, counts: Tensor, vectors: Tensor | None) -> Selection:
        # Counts by question are known to the device alone, so nothing is read here.
        return Selection(self.ranks(scores, visual, scores.shape[1], vectors) < counts[:, None])
