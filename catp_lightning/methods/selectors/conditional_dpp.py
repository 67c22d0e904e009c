"""A determinantal point process conditioned on relevance (CDPruner, 2506.10967, section 3.3)."""

from dataclasses import dataclass

from torch import Tensor

from catp_lightning.methods.selectors.base import FeatureSelector
from catp_lightning.methods.selectors.determinant import determinant_ranks, exact_dtype, most_in_a_kernel


@dataclass(frozen=True)
class ConditionalDPP(FeatureSelector):
    """Greedy MAP of a k-DPP with kernel diag(r) S diag(r): r is the score, S the cosine similarity of the tokens.

    Tokens are compared as they leave the vision part. Scores are relevances, at least 0; a negative score, NaN or
    infinity counts as 0.
    """

    def ranks(self, scores: Tensor, visual: Tensor, max_tokens: int, vectors: Tensor | None) -> Tensor:
        assert vectors is not None  # `vectors` above always gives some
        dtype = exact_dtype(vectors)
        relevance = scores.nan_to_num(0.0, 0.0, 0.0).to(dtype).clamp(0, most_in_a_kernel(dtype))
        return determinant_ranks(vectors, relevance, visual, max_tokens)
