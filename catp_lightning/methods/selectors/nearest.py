"""Similarity of tokens to the nearest of other tokens, asked again and again for fewer of them."""

from typing import Protocol

import torch
from torch import Tensor

from catp_lightning.methods.precision import without_autocast
from catp_lightning.methods.selectors.similarity import rounded_similarity, unit_vectors


class Nearest(Protocol):
    """Function that gives the similarity of some tokens to the nearest of others, as in `rounded_similarity`."""

    def __call__(self, tokens: Tensor, others: Tensor, there: Tensor) -> Tensor:
        """Return the largest similarity of each token to the others, none of which is the token: float [R, N].

        Args:
            tokens: int64 [R, N], R rows.
            others: int64 [R, M].
            there: bool [R, M], which of the others count.
        """


class AllPairs:
    """`Nearest` from the similarities of all pairs; makes no one wait for a GPU.

    Args:
        vectors: float [R, T, F].
    """

    def __init__(self, vectors: Tensor) -> None:
        self._similarity = rounded_similarity(vectors)
        self._rows = torch.arange(len(vectors), device=vectors.device)[:, None, None]

    def __call__(self, tokens: Tensor, others: Tensor, there: Tensor) -> Tensor:
        pairs = self._similarity[self._rows, tokens[..., None], others[:, None]]
        return pairs.masked_fill(~there[:, None], -torch.inf).amax(2)


class Neighbours:
    """`Nearest` for one long row of tokens of which fewer and fewer are asked for.

    The nearest neighbours of each token are listed; the first on the list that is among the others is the nearest of
    them. Tokens of whose list none is are compared with all others. Once half of the tokens are gone, new lists are
    made.

    Args:
        vectors: float [T, F].
    """

    LISTED = 24
    """Length of the lists: of 1,000 tokens one has none on it, if the others are a quarter of all, drawn at random."""

    def __init__(self, vectors: Tensor) -> None:
        self._unit = unit_vectors(vectors).nan_to_num()
        self._place = torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
        self._listed = 0

    def __call__(self, tokens: Tensor, others: Tensor, there: Tensor) -> Tensor:
        asked, among = tokens[0], others[0, there[0]]
        if not self._listed or 2 * (len(asked) + len(among)) <= self._listed:
            self._list(torch.cat([asked, among]))
        own = self._place[asked]
        is_other = torch.zeros(self._listed, dtype=torch.bool, device=asked.device)
        is_other[self._place[among]] = True
        found = is_other[self._tokens[own]]
        nearest = self._likeness[own, found.int().argmax(1)]
        none = (~found.any(1)).nonzero()[:, 0]
        if len(none):
            nearest[none] = self._similarity[own[none]][:, self._place[among]].amax(1)
        return nearest.round(decimals=5)[None]

    def _list(self, tokens: Tensor) -> None:
        """List the nearest neighbours of `tokens`, int64 [n], among them: places, int64 [n, LISTED], and likeness."""
        self._listed, unit = len(tokens), self._unit[tokens]
        self._place[tokens] = torch.arange(len(tokens), device=tokens.device)
        with without_autocast(unit):
            self._similarity = unit @ unit.T
        self._similarity.fill_diagonal_(-torch.inf)
        self._likeness, self._tokens = self._similarity.topk(min(self.LISTED, len(tokens)), dim=1)
