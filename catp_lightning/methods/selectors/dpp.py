"""Relevance and diversity: the most probable set of a determinantal point process (DPP), found greedily."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.scorers.cross_attention import standardise
from catp_lightning.methods.selectors.base import Selector
from catp_lightning.methods.selectors.determinant import determinant_ranks, exact_dtype, most_in_a_kernel, weighted
from catp_lightning.utils.on_cpu import on_cpu, on_device, places


@dataclass(frozen=True)
class DPP(Selector):
    """Greedy MAP of a k-DPP with kernel diag(q) S diag(q), q = exp(relevance * standardised score / 2).

    The kernel of CDPruner (2506.10967, section 3.3) with a strength added, solved by the algorithm of 1709.05135. S is
    the cosine similarity of the tokens' cross-attention maps, or of the tokens themselves: of two query tokens that
    attend to the same patches, one is enough.

    Attributes:
        relevance: weight of the scores beside diversity; 0 is diversity alone, a negative value reverses the scores.
        similarity: signal by which tokens are compared: "cross-attention" maps; "regions", the same maps, with the
            inner product weighted by the attention that patches receive in the vision tower's last block; or
            "outputs", the tokens as they leave the vision part.
        layers: the cross-attention layers whose maps are compared, counted from 0; None: all. Heads are kept apart.
    """

    compares: ClassVar[bool] = True

    relevance: float = 1.0
    similarity: Literal["cross-attention", "regions", "outputs"] = "cross-attention"
    layers: tuple[int, ...] | None = None

    @property
    def needs(self) -> Needs:
        if self.similarity == "outputs":
            return {Signal.IMAGE_FEATURES: None}
        weight: Needs = {Signal.VISION_ATTENTION_RECEIVED: None} if self.similarity == "regions" else {}
        return {Signal.CROSS_ATTENTION: self.layers, **weight}

    def vectors(self, seen: Observation) -> Tensor:
        if self.similarity == "outputs":
            return seen[Signal.IMAGE_FEATURES]
        maps = seen.by_layer(Signal.CROSS_ATTENTION, self.layers)
        if self.similarity == "regions":
            maps = maps * seen[Signal.VISION_ATTENTION_RECEIVED].sqrt()[:, None, None, None]
        return maps.flatten(1, 2).transpose(1, 2).flatten(2)

    def ranks(self, scores: Tensor, visual: Tensor, max_tokens: int, vectors: Tensor | None) -> Tensor:
        assert vectors is not None  # `vectors` above always gives some
        quality = self.quality(scores, visual, exact_dtype(vectors))
        return determinant_ranks(vectors, quality, visual, max_tokens)

    def kernel(self, scores: Tensor, visual: Tensor, similarity: Tensor) -> Tensor:
        """DPP kernel diag(q) S diag(q) from scores [R, T], mask [R, T] and similarity S [R, T, T]: float [R, T, T]."""
        return weighted(similarity.clone(), self.quality(scores, visual, similarity.dtype))

    def quality(self, scores: Tensor, visual: Tensor, dtype: torch.dtype) -> Tensor:
        """Quality q of each token, from scores [R, T] and mask [R, T]: [R, T] in `dtype`."""
        largest = most_in_a_kernel(dtype)  # squares of larger values would not be finite
        scores = scores.nan_to_num(0.0, 0.0, 0.0).to(dtype).clamp(-largest, largest)
        relevance = self._standardised(scores, visual)
        strength = max(-1e30, min(1e30, self.relevance))
        logarithm = relevance * (strength / 2)
        beyond = (logarithm.amax(1, keepdim=True) - math.log(largest)).clamp(min=0)
        return torch.exp(logarithm - beyond)

    def _standardised(self, scores: Tensor, visual: Tensor) -> Tensor:
        """Standardise the scores of each row's own tokens among themselves; others become 0: [R, T]."""
        there = on_cpu(visual)[0]
        if there.all():
            return standardise(scores)
        found = torch.zeros_like(scores)
        for count in there.sum(1).unique().tolist():
            own = places(on_device(there & (there.sum(1) == count)[:, None], scores.device), scores)
            standard = standardise(scores.flatten()[own].view(-1, max(count, 1))).flatten()
            found = found.flatten().scatter_(0, own, standard).view_as(scores)
        return found
