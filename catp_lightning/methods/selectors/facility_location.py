"""Keeps tokens that represent all others: greedy facility location."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from catp_lightning.methods.selectors.base import FeatureSelector
from catp_lightning.methods.selectors.fused import fused
from catp_lightning.methods.selectors.lazy import one_by_one
from catp_lightning.methods.selectors.similarity import squared_distances, whole_units, whole_vectors
from catp_lightning.utils.on_cpu import for_numpy

STEPS = 1e6
"""Steps in which distances are measured, in their mean."""

BLOCK = 2**17
"""Distances that are worked on together: a megabyte, which stays in a core's cache and needs few new pages."""


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
        if one_by_one(vectors) and len(vectors) > 1:
            each = zip(scores.split(1), visual.split(1), vectors.split(1), strict=True)
            return torch.cat([self.ranks(one, own, max_tokens, rows) for one, own, rows in each])
        finite = visual & (vectors.abs().amax(-1) < torch.inf)
        whole = for_numpy(vectors) and bool(finite.all())  # a copy is a tenth of the time that a choice takes
        distance = self._distances(vectors if whole else vectors.where(finite[..., None], 0))
        nearest = distance.amax((1, 2))[:, None].where(finite, 0)
        if one_by_one(vectors) and len(vectors):
            return _alone(distance[0], nearest[0], finite[0], visual[0], max_tokens)[None]
        return _together(distance, nearest, finite, visual, max_tokens)

    def _distances(self, vectors: Tensor) -> Tensor:
        """Return the distance of all pairs in steps of a millionth of their mean: float [R, T, F] -> [R, T, T].

        Numbers of steps are whole, since rounding errors, which differ by batch and device, would break ties between
        equal tokens; in float64 their sums are exact. They are the same in both directions.
        """
        if vectors.device.type == "mps":  # has no float64
            vectors = vectors.float()
            whole = F.normalize(vectors, dim=-1) if self.distance == "cosine" else vectors
        elif self.distance == "cosine":
            whole = whole_units(vectors).nan_to_num_(0)
        else:
            whole = whole_vectors(vectors)[0]
        found = squared_distances(whole)
        found = found.sqrt_() if self.distance == "euclidean" else found
        return found.mul_(STEPS / found.mean((1, 2), keepdim=True).clamp(min=1e-30)).round_()


@fused("facility_location")
def _together(distance: Tensor, nearest: Tensor, finite: Tensor, visual: Tensor, max_tokens: int) -> Tensor:
    """Return the ranks of all rows, int64 [R, T]: at each step the gain of every token is computed.

    Args:
        distance: float [R, T, T].
        nearest: float [R, T], distance of each token to the nearest one kept, at the beginning one that is nowhere
            exceeded; 0 for tokens that do not count.
        finite: bool [R, T], tokens whose distances are known.
        visual: bool [R, T], tokens that may be chosen.
        max_tokens: number of tokens of each row to rank.
    """
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


def _alone(distance: Tensor, nearest: Tensor, finite: Tensor, visual: Tensor, max_tokens: int) -> Tensor:
    """Return the ranks of one row, int64 [T], as `_together`: at each step gains change by what came nearer alone.

    The arguments are those of `_together` without the first dimension. A step's share of the work is that of the tokens
    that the last choice stands for, so that all steps together take about as much as log(max_tokens) of those there.
    Operations are NumPy's, which take a fraction of the time where there is little to do.
    """
    ranks = torch.full(visual.shape, max_tokens, dtype=torch.int64, device=visual.device)
    apart, near, counts = distance.numpy(), nearest.numpy().copy(), finite.numpy()
    nearer = np.empty((max(1, BLOCK // apart.shape[1]), apart.shape[1]), apart.dtype)
    gain = near.sum() - apart @ counts.astype(apart.dtype)  # nothing is farther than `nearest` is at the beginning
    gain[~counts] = -1
    gain[~visual.numpy()] = -np.inf
    for step in range(min(max_tokens, int(visual.sum()))):
        best = int(gain.argmax())
        ranks[best], gain[best] = step, -np.inf
        changed = np.flatnonzero(apart[best] < near)
        for start in range(0, len(changed), len(nearer)):
            some = changed[start : start + len(nearer)]
            was, now = near[some], apart[best, some]
            left = np.take(apart, some, axis=0, out=nearer[: len(some)], mode="clip")
            np.minimum(np.maximum(left, now[:, None], out=left), was[:, None], out=left)
            gain -= (was.sum() - left.sum(0)) * counts
            near[some] = now
    return ranks
