"""Similarity of tokens, for selectors that compare similarities with each other."""

import torch
from torch import Tensor
from torch.nn import functional as F

from catp_lightning.methods.precision import without_autocast
from catp_lightning.methods.selectors.determinant import cosine_similarity


def rounded_similarity(vectors: Tensor) -> Tensor:
    """Cosine similarity of all pairs of tokens, rounded to five decimals: float [R, T, F] -> [R, T, T].

    Similarities that differ only by rounding error, such as those of identical tokens, become equal; otherwise the
    error, which differs by batch and device, would break the tie. A token that is 0 or NaN has similarity 0 to any
    other.
    """
    return cosine_similarity(vectors).round(decimals=5)


def most_similar(vectors: Tensor, target: Tensor) -> Tensor:
    """Index of the token of `target` that each token is most similar to, of equal ones the lowest.

    Similarities are those of `rounded_similarity`, of tokens to targets alone.

    Args:
        vectors: float [R, T, F].
        target: bool [R, T].

    Returns:
        int64 [R, T]; 0 in rows without a target.
    """
    unit = F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)
    found = torch.zeros_like(target, dtype=torch.int64)
    for row, own in enumerate(target):
        tokens = own.nonzero()[:, 0]
        if len(tokens):
            with without_autocast(unit):
                similarity = (unit[row] @ unit[row, tokens].T).nan_to_num_().round_(decimals=5)
            found[row] = tokens[similarity.argmax(1)]
    return found
