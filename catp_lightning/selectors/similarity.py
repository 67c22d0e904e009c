"""Similarity of tokens for methods that compare similarities with each other."""

from torch import Tensor

from catp_lightning.selectors.dpp import cosine_similarity


def rounded_similarity(vectors: Tensor) -> Tensor:
    """Cosine of all pairs of tokens to five decimals: float [R, T, F] -> [R, T, T].

    What is equal but for rounding, as that of tokens that are the same, is a tie then: or rounding, which differs by
    batch and device, would break it. Of a token that is 0, or not a number, it is 0 with any other.
    """
    return cosine_similarity(vectors).round(decimals=5)
