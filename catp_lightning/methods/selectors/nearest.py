"""Similarity of tokens to the nearest of other tokens, asked again and again for fewer of them."""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from catp_lightning.methods.selectors.similarity import inner_products, rounded_similarity, unit_vectors

Array = np.ndarray[Any, np.dtype[Any]]


class Nearest(Protocol):
    """Function that gives the similarity of some tokens to the nearest of others, as in `rounded_similarity`."""

    def __call__(self, tokens: Array, others: Array) -> Array:
        """Return the largest similarity of each of N tokens to M others, none of which is the token.

        Args:
            tokens: int64 [N].
            others: int64 [M], at least one.

        Returns:
            float [N].
        """


class AllPairs:
    """`Nearest` from the similarities of all pairs.

    Args:
        vectors: float [T, F], on the CPU.
    """

    def __init__(self, vectors: Tensor) -> None:
        self._similarity = rounded_similarity(vectors[None])[0].detach().numpy()

    def __call__(self, tokens: Array, others: Array) -> Array:
        return np.asarray(self._similarity[tokens].take(others, 1).max(1))


class Neighbours:
    """`Nearest` for a long row of tokens of which fewer and fewer are asked for.

    The nearest neighbours of each token are listed; the first on the list that is among the others is the nearest of
    them. Tokens of whose list none is are compared with all others. Once half of the tokens are gone, new lists are
    made.

    Args:
        vectors: float [T, F], on the CPU.
    """

    LISTED = 12
    """Length of the lists: of 100 tokens three have none on it, if the others are a quarter of all, drawn at random."""

    def __init__(self, vectors: Tensor) -> None:
        self._unit = unit_vectors(vectors.detach()).nan_to_num()
        self._place = np.zeros(len(vectors), np.int64)
        self._listed = 0

    def __call__(self, tokens: Array, others: Array) -> Array:
        if not self._listed or 2 * (len(tokens) + len(others)) <= self._listed:
            self._list(np.concatenate([tokens, others]))
        own = self._place[tokens]
        is_other = np.zeros(self._listed, np.bool_)
        is_other[self._place[others]] = True
        found = is_other[self._tokens[own]]
        nearest = self._likeness[own, found.argmax(1)]
        none = np.flatnonzero(~found.any(1))
        if len(none):
            nearest[none] = self._similarity[own[none]].take(self._place[others], 1).max(1)
        return np.asarray(torch.from_numpy(nearest).round(decimals=5))

    def _list(self, tokens: Array) -> None:
        """List the nearest neighbours of `tokens`, int64 [n], among them: places, int64 [n, LISTED], and likeness."""
        self._listed, unit = len(tokens), self._unit[torch.from_numpy(tokens)]
        self._place[tokens] = np.arange(len(tokens))
        similarity = inner_products(unit[None])[0].fill_diagonal_(-torch.inf)
        likeness, listed = similarity.topk(min(self.LISTED, len(tokens)), dim=1)
        self._similarity, self._likeness, self._tokens = (value.numpy() for value in (similarity, likeness, listed))
