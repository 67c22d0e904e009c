"""Similarity of tokens, for selectors that compare similarities with each other."""

from torch import Tensor

from catp_lightning.methods.selectors.dpp import cosine_similarity


def rounded_similarity(vectors: Tensor) -> Tensor:
    """Cosine similarity of all pairs of tokens, rounded to five decimals: float [R, T, F] -> [R, T, T].

    Similarities that differ only by rounding error, such as those of identical tokens, become equal; otherwise the
    error, which differs by batch and device, would break the tie. A token that is 0 or NaN has similarity 0 to any
    other.
    """
    return cosine_similarity(vectors).round(decimals=5)
