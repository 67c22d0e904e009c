"""Recycling what is dropped, against density-peak clustering by hand."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from catp_lightning.methods.selectors.dart import DART
from catp_lightning.methods.selectors.recycle import Recycle, split
from catp_lightning.methods.selectors.similarity import exact_distances
from tests.support.plain_numbers import Rows, best_first, numbers, some

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("tokens", [1, 2, 9, 10, 34, 100, 576])
def test_kept_and_clusters_are_the_budget(tokens: int) -> None:
    for budget in range(tokens + 1):
        kept, recycled, clusters = split(budget, tokens)
        assert kept + clusters == budget and kept >= clusters
        if budget in (0, 1, tokens):
            assert clusters == recycled == 0
            continue
        assert recycled == math.ceil((tokens - kept) * 3 / 10 - 1e-9)
        assert clusters == min(recycled // 10 + 1, budget // 2) and kept + recycled <= tokens


def recycled_by_hand(scores: list[float], there: list[int], budget: int, vectors: Rows) -> list[int]:
    """Which token carries each, -1 for none: density peaks over the 30% of what is dropped that score highest."""
    carrier, order = [-1] * len(scores), best_first(scores, there)
    kept, recycled, clusters = split(budget, len(there))
    for place in order[:kept]:
        carrier[place] = place
    points = sorted(order[kept : kept + recycled])
    if not clusters:
        return carrier
    width = math.sqrt(len(vectors[0]))
    apart = {
        (a, b): math.sqrt(sum((x - y) ** 2 for x, y in zip(vectors[a], vectors[b], strict=True))) / width
        for a in points
        for b in points
    }
    density, peak = {}, {}
    for a in points:
        nearest = sorted(apart[a, b] for b in points if b != a)[:clusters]
        density[a] = math.exp(-sum(d * d for d in nearest) / len(nearest)) if nearest else 0.0
    for a in points:
        denser = [apart[a, b] for b in points if density[b] > density[a] or (density[b] == density[a] and b < a)]
        peak[a] = density[a] * (min(denser) if denser else max(apart.values()))
    centres = sorted(sorted(points, key=lambda a: (-peak[a], a))[:clusters])
    for a in points:
        carrier[a] = a if a in centres else min(centres, key=lambda centre: (apart[a, centre], centre))
    return carrier


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 3))
def test_recycling_is_density_peak_clustering_of_what_is_dropped(seed: int, tokens: int, size: int) -> None:
    scores, vectors, there = numbers((3, tokens), seed, 4), numbers((3, tokens, size), seed + 1), some(3, tokens, seed)
    scores[0, seed % tokens] = math.nan
    own = there.sum(1)
    counts = (own * torch.tensor([seed % 5 + 1, 2, 1]) / 5).ceil().long().minimum(own)
    keep = Recycle().select(scores, there, counts, vectors).keep
    carrier = Recycle().select(scores, there, keep.sum(1), vectors).destination
    assert torch.equal(keep.sum(1), counts) and not (keep & ~there).any()
    for row in range(3):
        places = there[row].nonzero()[:, 0].tolist()
        expected = recycled_by_hand(scores[row].tolist(), places, int(counts[row]), vectors[row].tolist())
        assert carrier[row].tolist() == expected
        assert keep[row].tolist() == [place == own for place, own in enumerate(expected)]


def test_three_recycled_tokens_by_hand() -> None:
    """Of 12 tokens 4 stay: 3 by score; the next 3 are at 0, 1 and 5: 0 is densest (first of a tie) and farthest."""
    vectors = torch.tensor([9.0, 9.0, 9.0, 0.0, 1.0, 5.0, *[9.0] * 6])[None, :, None]
    scores, there = -torch.arange(12.0)[None], torch.ones(1, 12, dtype=torch.bool)
    keep = Recycle().select(scores, there, torch.tensor([4]), vectors).keep
    assert keep[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3]
    destination = Recycle().select(scores, there, keep.sum(1), vectors).destination
    assert destination is not None and destination[0].tolist() == [0, 1, 2, 3, 3, 3, *[-1] * 6]


@pytest.mark.parametrize("selector", [Recycle(), DART()], ids=["recycle", "dart"])
def test_rows_that_are_nan_or_all_alike_are_chosen_from_all_the_same(selector: Any) -> None:
    scores, there = torch.zeros(2, 40), torch.ones(2, 40, dtype=torch.bool)
    vectors = torch.ones(2, 40, 3)
    vectors[1, 7:12] = math.nan
    keep = selector.select(scores, there, torch.tensor([5, 5]), vectors).keep
    assert keep.sum(1).tolist() == [5, 5] and keep[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4]
    if selector.merges:
        carrier = selector.select(scores, there, keep.sum(1), vectors).destination
        assert all(keep[row, own] for row in (0, 1) for own in carrier[row].tolist() if own >= 0)


def test_distances_are_exact_and_equal_pairs_equally_far_apart_wherever_they_stand() -> None:
    vectors = torch.randn(200, 300, generator=torch.Generator().manual_seed(2))
    vectors[:, 7] *= 100
    vectors[150:] = vectors[:50]
    vectors[3, 5], vectors[4, 5] = math.nan, math.inf
    apart = exact_distances(vectors)
    known = [place for place in range(200) if place not in (3, 4, 153, 154)]
    direct = (vectors[known, None].double() - vectors[known].double()).norm(dim=-1)
    torch.testing.assert_close(apart[known][:, known], direct, rtol=3e-5, atol=0)
    assert apart[[3, 4]].isinf().all() and apart[:, [3, 4]].isinf().all()
    assert torch.equal(apart[5:50, :150], apart[155:, :150]) and not apart[range(5, 50), range(155, 200)].any()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(exact_distances(vectors[order]), apart[order][:, order])
