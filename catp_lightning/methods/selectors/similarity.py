"""Similarity of tokens, for selectors that compare similarities with each other."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from catp_lightning.methods.precision import without_autocast
from catp_lightning.methods.selectors.lazy import at_once
from catp_lightning.utils.on_cpu import for_numpy


def unit_vectors(vectors: Tensor) -> Tensor:
    """Return vectors of length 1, in float32 at least: [..., F] -> [..., F]; a vector of zeros stays one."""
    return F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)


def inner_products(vectors: Tensor) -> Tensor:
    """Inner products of all pairs of tokens: float [R, T, F] -> [R, T, T]; no gradient passes through them.

    On the CPU NumPy computes one of the two equal halves. Equal tokens may then differ by rounding, unless sums are
    exact or rounded.
    """
    if for_numpy(vectors):
        rows = vectors.detach().numpy()
        return torch.from_numpy(rows @ rows.transpose(0, 2, 1))
    with without_autocast(vectors):
        return vectors @ vectors.transpose(1, 2)


def cosine_similarity(vectors: Tensor) -> Tensor:
    """Cosine similarity of all pairs of tokens, in float32 at least: [R, T, F] -> [R, T, T]; NaN becomes 0."""
    similarity = inner_products(unit_vectors(vectors).nan_to_num_())
    similarity.diagonal(dim1=1, dim2=2).fill_(1)  # exactly 1: rounding, which differs by batch, would break ties
    return similarity


def rounded_similarity(vectors: Tensor) -> Tensor:
    """Cosine similarity of all pairs of tokens, rounded to five decimals: float [R, T, F] -> [R, T, T].

    Similarities that differ only by rounding error, such as those of identical tokens, become equal; otherwise the
    error, which differs by batch and device, would break the tie. A token that is 0 or NaN has similarity 0 to any
    other.
    """
    return cosine_similarity(vectors).mul_(1e5).round_().div_(1e5)  # `decimals=5` is the same and takes twice as long


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


def exact_similarity(vectors: Tensor) -> Tensor:
    """Cosine similarity of all pairs of tokens: float [R, T, F] -> float64 [R, T, T]; NaN becomes 0.

    It is that of `whole_units`, so that it depends neither on the batch nor on the device, and equal tokens are equal
    in it. On Apple's GPUs, which have no float64, it is float32 and may differ by rounding.
    """
    if vectors.device.type == "mps":
        return cosine_similarity(vectors)
    similarity = inner_products(whole_units(vectors))
    shorter = similarity.diagonal(dim1=1, dim2=2).rsqrt()
    similarity.mul_(shorter[..., None]).mul_(shorter[:, None]).nan_to_num_()
    similarity.diagonal(dim1=1, dim2=2).fill_(1)
    return similarity


def whole_units(vectors: Tensor) -> Tensor:
    """Return vectors of length 2^25, rounded to whole numbers: float [..., F] -> float64 [..., F].

    Inner products and squared distances of two of them are below 2^53, and exact in whatever order they are added;
    their cosines differ from those of the vectors given by some 1e-8. NaN comes of vectors that have no direction: of
    zeros, or with values that are not finite.
    """
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True, dtype=torch.float64)
    return (vectors / length.mul_(2.0**-25)).round_()


def exact_units(vectors: Tensor) -> Tensor:
    """Return vectors of length 1 whose inner products are those of `exact_similarity`, but for rounding.

    Args:
        vectors: float [..., F].

    Returns:
        float64 [..., F], on Apple's GPUs float32; zeros for a vector of zeros or with a value that is not finite.
    """
    if vectors.device.type == "mps":
        return unit_vectors(vectors).nan_to_num_(0)
    whole = whole_units(vectors)  # a vector without a direction has NaN in it, or no length: all of it becomes NaN
    return whole.div_(torch.linalg.vector_norm(whole, dim=-1, keepdim=True)).nan_to_num_(0)


def whole_vectors(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Round coordinates to whole multiples of a step, for inner products and distances that are exact in float64.

    The step is the largest coordinate of a row of tokens divided by 2^19 where F is 4,096.

    Args:
        vectors: float [R, T, F], finite.

    Returns:
        The multiples, float64 [R, T, F], and the steps, float64 [R, 1, 1].
    """
    bits = whole_bits(vectors.shape[-1])
    _, exponent = torch.frexp(vectors.abs().amax((1, 2), keepdim=True))
    step = torch.pow(2.0, (exponent - bits).clamp(min=-900).double())
    return (vectors / step).round_(), step


def whole_bits(features: int) -> int:
    """Return the bits of whole coordinates of `features` each whose squared distances are below 2^53."""
    return (50 - math.ceil(math.log2(max(2, features)))) // 2


def squared_distances(vectors: Tensor) -> Tensor:
    """Squared Euclidean distances of all pairs of tokens, at least 0: float [R, T, F] -> [R, T, T]."""
    products = inner_products(vectors)
    squares = products.diagonal(dim1=1, dim2=2).clone()
    return products.mul_(-2).add_(squares[:, None]).add_(squares[..., None]).clamp_(min=0)


def exact_distances(vectors: Tensor) -> Tensor:
    """Euclidean distance of all pairs of tokens: float [N, F] -> float64 [N, N]; infinite where a value is not finite.

    Coordinates are rounded as by `whole_vectors`: equal pairs are equally far apart, wherever they stand, which a
    product of matrices would otherwise not give, and it is many times faster than sums of differences.
    """
    finite = vectors.isfinite().all(1)
    known = (vectors.cpu() if vectors.device.type == "mps" else vectors).masked_fill(~finite[:, None], 0)
    whole, step = whole_vectors(known[None])
    apart = squared_distances(whole).sqrt_().mul_(step)[0]
    return apart.masked_fill_(~(finite[:, None] & finite), torch.inf).to(vectors.device)
