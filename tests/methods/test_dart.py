"""DART against a slow version of its definition, written with loops and plain numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from catp_lightning import PolicyError, PruningPolicy
from catp_lightning.methods.observation import Observation, Signal
from catp_lightning.methods.scorers.dart import DART as DartScorer
from catp_lightning.methods.selectors.dart import DART
from catp_lightning.methods.selectors.recycle import Recycle
from tests.support.plain_numbers import Rows, best_first, numbers, some

pytestmark = pytest.mark.usefixtures("no_grad")


def dart_by_hand(scores: list[float], there: list[int], budget: int, vectors: Rows, pivots: int) -> list[bool]:
    """Each pivot in turn takes the tokens least like it."""
    first = best_first(scores, there)[: min(pivots, budget)]
    kept = list(first)
    for turn, pivot in enumerate(first):
        rest = budget - len(first)
        takes = rest // len(first) + (turn < rest % len(first))
        likeness = {}
        for token in there:
            ours, theirs = vectors[pivot], vectors[token]
            product = sum(a * b for a, b in zip(ours, theirs, strict=True))
            norms = math.sqrt(sum(a * a for a in ours) * sum(b * b for b in theirs))
            likeness[token] = round(product / norms, 9) if norms else 0.0
        others = sorted((token for token in there if token not in kept), key=lambda token: (likeness[token], token))
        kept += others[:takes]
    return [place in kept for place in range(len(scores))]


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 5))
def test_dart_keeps_what_is_least_like_each_pivot_in_turn(seed: int, tokens: int, pivots: int) -> None:
    vectors, there = numbers((3, tokens, 3), seed, 1), some(3, tokens, seed)
    vectors = vectors * torch.tensor([1.0, 2.0, 4.0])[:, None, None]  # scaling by these is exact
    scores = DartScorer().score(Observation(there, {}, {Signal.HIDDEN_STATES: vectors}))
    assert torch.equal(scores, vectors.abs().sum(-1))
    own = there.sum(1)
    counts = (own * torch.tensor([seed % 5 + 1, 3, 1]) / 5).ceil().long().minimum(own)
    selector = DART(pivots=pivots)
    keep = selector.select(
        scores, there, counts, selector.vectors(Observation(there, {}, {Signal.HIDDEN_STATES: vectors}))
    ).keep
    for row in range(3):
        places = there[row].nonzero()[:, 0].tolist()
        expected = dart_by_hand(scores[row].tolist(), places, int(counts[row]), vectors[row].tolist(), pivots)
        assert keep[row].tolist() == expected


@pytest.mark.parametrize(
    ("budget", "stay"),
    [(1, [0]), (2, [0, 1]), (3, [0, 1, 3]), (4, [0, 1, 3, 4]), (5, [0, 1, 2, 3, 4]), (6, [0, 1, 2, 3, 4, 5])],
)
def test_two_pivots_by_hand(budget: int, stay: list[int]) -> None:
    """The first takes what points away from it, (-1, 0), then (0, -1); the second what is least like (0, 9)."""
    vectors = torch.tensor([[[10.0, 0.0], [0.0, 9.0], [1.0, 0.0], [-1.0, 0.0], [0.0, -1.0], [1.0, 1.0]]])
    there = torch.ones(1, 6, dtype=torch.bool)
    keep = DART(pivots=2).select(vectors.abs().sum(-1), there, torch.tensor([budget]), vectors).keep
    assert keep[0].nonzero()[:, 0].tolist() == stay


def test_dart_compares_rows_of_half_precision_in_float32() -> None:
    hidden = torch.full((1, 1, 300), 1.0, dtype=torch.bfloat16)
    seen = Observation(torch.ones(1, 1, dtype=torch.bool), {}, {Signal.HIDDEN_STATES: hidden})
    assert DartScorer().score(seen).item() == 300 and DART().vectors(seen).dtype == torch.float32
    assert Recycle().vectors(seen).dtype == torch.float32


def test_dart_without_pivots_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"pivots is 0.*at least 1"):
        PruningPolicy(scorer="dart", selector_args={"pivots": 0})
