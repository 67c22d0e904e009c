"""CATP, arXiv 2404.08567: query tokens ranked by votes of the Q-Former's cross-attention heads."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.scorers.base import AttentionScorer, weigh


@dataclass(frozen=True)
class CATP(AttentionScorer):
    """Borda count: every (layer, head, image token) ranks the query tokens by attention and gives them 0 to T-1 points.

    arXiv 2404.08567, section 3 (cross-attention voting), and its image-token weights. The weighted vote multiplies
    the points by the image token's weight; the authors' last code multiplies probabilities before ranking, which
    changes no rank.

    Attributes:
        image_weight: "received" weighs an image token's votes by the attention it receives in the vision tower's last
            block, summed over heads and rows; "none" weighs the votes of all image tokens equally.
    """

    image_weight: Literal["none", "received"] = "none"

    @property
    def needs(self) -> Needs:
        weight: Needs = {Signal.VISION_ATTENTION_RECEIVED: None} if self.image_weight == "received" else {}
        return {Signal.CROSS_ATTENTION: self.layers, **weight}

    def head_scores(self, seen: Observation) -> Tensor:
        weights = seen[Signal.VISION_ATTENTION_RECEIVED] if self.image_weight == "received" else None
        return _summed(borda_points(seen.by_layer(Signal.CROSS_ATTENTION, self.layers)), weights)


def borda_vote(attention: Tensor, head_weights: Tensor | None = None, image_weights: Tensor | None = None) -> Tensor:
    """Scores of the query tokens by Borda count.

    Args:
        attention: float [B, L, H, Q, N], attention of Q queries over N image tokens.
        head_weights: float [L, H], the weight of each head's votes; None: all 1.
        image_weights: float [B, N], the weight of each image token's votes; None: all 1.

    Returns:
        float [B, Q]; without weights between 0 and L * H * N * (Q - 1). Where attention is equal, the query token with
        the lower index ranks higher.

    Example:
        >>> rows = [[0.7, 0.2], [0.1, 0.5], [0.2, 0.3]]  # 3 queries, 2 image tokens
        >>> attention = torch.tensor(rows)[None, None, None]
        >>> borda_vote(attention)
        tensor([[2., 2., 2.]])
        >>> borda_vote(attention, image_weights=torch.tensor([[1.0, 0.5]]))
        tensor([[2.0000, 1.0000, 1.5000]])
    """
    return weigh(_summed(borda_points(attention), image_weights), head_weights)


def borda_points(attention: Tensor) -> Tensor:
    """Points 0 to Q-1 that each of N image tokens gives each of Q query tokens: [..., Q, N] -> the same shape.

    A query token gets a point for every query token that it beats. Comparing pairs, one query token against all at a
    time, needs no sort and no memory beyond the result; two argsorts cost 3.5 times as much.
    """
    queries = attention.shape[-2]
    small = torch.uint8 if queries <= 256 else torch.int32  # additions of bytes take half the time of floats
    points = torch.zeros(attention.shape, dtype=small, device=attention.device)
    for rival in range(queries):
        other = attention[..., rival : rival + 1, :]
        points[..., :rival, :] += (attention[..., :rival, :] >= other).view(torch.uint8)
        points[..., rival + 1 :, :] += (attention[..., rival + 1 :, :] > other).view(torch.uint8)
    return points.to(attention.dtype)


def _summed(points: Tensor, image_weights: Tensor | None) -> Tensor:
    """Sum points over image tokens, weighted if weights are given: [B, L, H, Q, N], [B, N] or None -> [B, L, H, Q]."""
    if image_weights is None:
        return points.sum(-1)
    return torch.einsum("blhqn,bn->blhq", points, image_weights.to(points))
