"""The union over heads of what each ranks high (Trimmed Llama, 2504.00557)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from catp_lightning.observation import Needs, Observation, Signal
from catp_lightning.selectors.base import Selector, ranked


@dataclass(frozen=True)
class Union(Selector):
    """Each head of a cross-attention layer picks its share of rows; what any head picks stays.

    Attributes:
        budget: whose the budget is. "head", as published: each head picks that many, so that the union is larger and
            its size differs between images; compare by tokens kept. "rows": the union's own, for comparison at equal
            rows: heads pick in turn until it is reached, and of rows of equal rank those with the higher score join.
    """

    budget: Literal["head", "rows"] = "head"

    @property
    def needs(self) -> Needs:
        return {Signal.CROSS_ATTENTION_TO_IMAGE: None}

    def vectors(self, seen: Observation) -> Tensor:
        """What each head pays a row: float [I, T, H]."""
        return seen.by_layer(Signal.CROSS_ATTENTION_TO_IMAGE).flatten(1, 2).transpose(1, 2)

    def ranks(self, scores: Tensor, visual: Tensor, most: int, vectors: Tensor | None) -> Tensor:
        """The best rank that any head gives a token; several tokens share one where the budget is each head's."""
        assert vectors is not None  # `vectors` above always gives some
        best = torch.stack([ranked(head, visual) for head in vectors.unbind(2)]).amin(0)
        if self.budget == "head":
            return best
        by_score = ranked(scores, visual)
        return ranked(-(best * visual.shape[1] + by_score).double(), visual)
