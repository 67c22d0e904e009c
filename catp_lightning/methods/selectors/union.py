"""Keeps the union over heads of the tokens that each head ranks high (Trimmed Llama, 2504.00557)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.selectors.base import Selector, ranked


@dataclass(frozen=True)
class Union(Selector):
    """Keeps the tokens that any head of a cross-attention layer ranks high.

    Attributes:
        budget: "head", as published: the budget holds for each head, so that the union is larger and its size differs
            between images; compare by tokens kept. "rows": the budget holds for the union, for comparison at an equal
            number of tokens: heads pick in turn until it is reached, and of tokens of equal rank those with the higher
            score are kept.
    """

    budget: Literal["head", "rows"] = "head"

    @property
    def needs(self) -> Needs:
        return {Signal.CROSS_ATTENTION_TO_IMAGE: None}

    def vectors(self, seen: Observation) -> Tensor:
        """Attention that each token gets from each head of each cross-attention layer: float [I, T, layers x heads]."""
        return seen.by_layer(Signal.CROSS_ATTENTION_TO_IMAGE).flatten(1, 2).transpose(1, 2)

    def ranks(self, scores: Tensor, visual: Tensor, max_tokens: int, vectors: Tensor | None) -> Tensor:
        """Best rank that any head gives each token, int64 [R, T]; with `budget` "head" several tokens may share a rank.

        Args:
            scores: float [R, T], which break ties with `budget` "rows".
            visual: bool [R, T], True for tokens that exist and may be chosen.
            max_tokens: not read.
            vectors: float [R, T, layers x heads], as from `vectors`.
        """
        assert vectors is not None  # `vectors` above always gives some
        best = torch.stack([ranked(head, visual) for head in vectors.unbind(2)]).amin(0)
        if self.budget == "head":
            return best
        by_score = ranked(scores, visual)
        return ranked(-(best * visual.shape[1] + by_score).double(), visual)
