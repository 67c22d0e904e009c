"""Keeps tokens that represent all others: greedy facility location."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from catp_lightning.methods.precision import without_autocast
from catp_lightning.methods.selectors.base import FeatureSelector


@dataclass(frozen=True)
class FacilityLocation(FeatureSelector):
    """Keeps, step by step, the token that shortens the tokens' distances to the nearest token kept most, in total.

    Scores are ignored. The facility location function is monotone and submodular, so that the greedy set reaches at
    least 1 - 1/e of the best (Nemhauser, Wolsey and Fisher 1978, doi:10.1007/BF01588971; as a rule to choose
    representative elements Lin and Bilmes 2011, ACL P11-1052). Diversity alone keeps outliers first; this keeps what
    stands for many tokens. Where gains are equal the lowest index wins; a token with NaN in its features is kept last.

    Attributes:
        distance: "cosine", 1 - cosine; "euclidean"; or "squared", the squared Euclidean distance, as in k-medoids.
    """

    distance: Literal["cosine", "euclidean", "squared"] = "cosine"

    def ranks(self, scores: Tensor, visual: Tensor, max_tokens: int, vectors: Tensor | None) -> Tensor:
        assert vectors is not None  # `vectors` above always gives some
        finite = visual & vectors.isfinite().all(-1)
        distance = self._distances(vectors.masked_fill(~finite[..., None], 0))
        farthest = distance.masked_fill(~(finite[:, None] & finite[..., None]), 0).amax((1, 2))
        nearest = farthest[:, None].expand_as(scores).masked_fill(~finite, 0)
        ranks = torch.full(visual.shape, max_tokens, device=visual.device, dtype=torch.int64)
        rows = torch.arange(len(visual), dtype=torch.int64, device=visual.device)
        for step in range(max_tokens):
            gain = (nearest[:, None] - distance).clamp(min=0).sum(2)
            open_ = gain.masked_fill(~finite, -1).masked_fill(~visual | (ranks < max_tokens), -torch.inf)
            best = open_.argmax(1)
            there = open_[rows, best] > -torch.inf
            ranks[rows, best] = torch.where(there, step, ranks[rows, best])
            nearest = nearest.minimum(distance[rows, best])
        return ranks

    def _distances(self, vectors: Tensor) -> Tensor:
        """Return the distance of all pairs as a share of their mean, in steps of 1e-6: float [R, T, F] -> [R, T, T].

        In steps, since rounding errors, which differ by batch and device, would break ties between equal tokens.
        """
        wide = torch.float32 if vectors.device.type == "mps" else torch.float64
        vectors = vectors.to(wide)
        if self.distance == "cosine":
            vectors = F.normalize(vectors, dim=-1)
        with without_autocast(vectors):
            products = vectors @ vectors.transpose(1, 2)
        squares = products.diagonal(dim1=1, dim2=2)
        found = (squares[:, None] + squares[..., None] - 2 * products).clamp(min=0)
        found = found.sqrt() if self.distance == "euclidean" else found
        return (found / found.mean((1, 2), keepdim=True).clamp(min=1e-30)).round(decimals=6)
