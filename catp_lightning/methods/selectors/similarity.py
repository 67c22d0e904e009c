"""Similarity of tokens, for selectors that compare similarities with each other."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from catp_lightning.methods.precision import without_autocast
from catp_lightning.methods.selectors.lazy import at_once


def unit_vectors(vectors: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return vectors of length 1, in `dtype` at least: [..., F] -> [..., F]; a vector of zeros stays one."""
    return F.normalize(vectors.to(torch.promote_types(vectors.dtype, dtype)), dim=-1)


def cosine_similarity(vectors: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Cosine similarity of all pairs of tokens, in `dtype` at least: [R, T, F] -> [R, T, T]; NaN becomes 0."""
    vectors = unit_vectors(vectors, dtype)
    with without_autocast(vectors):
        similarity = (vectors @ vectors.transpose(1, 2)).nan_to_num_()
    similarity.diagonal(dim1=1, dim2=2).fill_(1)  # exactly 1: rounding, which differs by batch, would break ties
    return similarity


def rounded_similarity(vectors: Tensor) -> Tensor:
    """Cosine similarity of all pairs of tokens, rounded to five decimals: float [R, T, F] -> [R, T, T].

    Similarities that differ only by rounding error, such as those of identical tokens, become equal; otherwise the
    error, which differs by batch and device, would break the tie. A token that is 0 or NaN has similarity 0 to any
    other.
    """
    return cosine_similarity(vectors).round_(decimals=5)


def most_similar(vectors: Tensor, target: Tensor) -> Tensor:
    """Index of the token of `target` that each token is most similar to, of equal ones the lowest.

    Similarities are those of `rounded_similarity`; of long rows, those of tokens to targets alone are computed.

    Args:
        vectors: float [R, T, F].
        target: bool [R, T].

    Returns:
        int64 [R, T]; 0 in rows without a target.
    """
    if at_once(vectors):
        return rounded_similarity(vectors).masked_fill(~target[:, None], -torch.inf).argmax(2)
    unit = unit_vectors(vectors)
    found = torch.zeros_like(target, dtype=torch.int64)
    for row, own in enumerate(target):
        tokens = own.nonzero()[:, 0]
        if len(tokens):
            with without_autocast(unit):
                similarity = (unit[row] @ unit[row, tokens].T).nan_to_num_().round_(decimals=5)
            similarity[tokens, torch.arange(len(tokens), device=tokens.device)] = 1  # as in `cosine_similarity`
            found[row] = tokens[similarity.argmax(1)]
    return found


def exact_distances(vectors: Tensor) -> Tensor:
    """Euclidean distance of all pairs of tokens: float [N, F] -> float64 [N, N]; infinite where a value is not finite.

    Coordinates are rounded to whole multiples of a step, the largest coordinate divided by 2^20 where F is 4,096, so
    that sums of their products are exact in float64: equal pairs are equally far apart, wherever they stand, which a
    product of matrices would otherwise not give, and it is many times faster than sums of differences.
    """
    finite = vectors.isfinite().all(1)
    wide = (vectors.cpu() if vectors.device.type == "mps" else vectors).double().masked_fill(~finite[:, None], 0)
    bits = (52 - math.ceil(math.log2(max(2, wide.shape[1])))) // 2
    _, exponent = torch.frexp(wide.abs().amax())
    step = torch.pow(2.0, (exponent - bits).clamp(min=-900).double())
    whole = (wide / step).round_()
    with without_autocast(wide):
        products = whole @ whole.T
    squares = products.diagonal()
    apart = (squares[:, None] + squares - 2 * products).sqrt_().mul_(step)
    return apart.masked_fill_(~(finite[:, None] & finite), torch.inf).to(vectors.device)
