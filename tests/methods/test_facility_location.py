"""Facility location: the token that stands for the others best, step by step, as its definition says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from catp_lightning.methods.selectors import lazy
from catp_lightning.methods.selectors.facility_location import STEPS, FacilityLocation

DISTANCES = ("cosine", "euclidean", "squared")


def slow_order(vectors: Tensor, distance: str, count: int) -> list[int]:
    """Tokens in the order in which they are kept; distances in whole millionths of their mean."""
    points = vectors.double()
    if distance == "cosine":
        points = torch.nn.functional.normalize(points, dim=-1)
    apart = (points[:, None] - points[None]).square().sum(-1)
    apart = apart.sqrt() if distance == "euclidean" else apart
    steps = [[round(float(value)) for value in row] for row in apart * (STEPS / apart.mean().clamp(min=1e-30))]
    tokens = range(len(steps))
    nearest = [max(map(max, steps))] * len(steps)
    order: list[int] = []
    for _ in range(count):
        gains = {t: sum(max(0, n - far) for n, far in zip(nearest, steps[t], strict=True)) for t in tokens}
        order.append(max((t for t in tokens if t not in order), key=lambda t: (gains[t], -t)))
        nearest = [min(n, far) for n, far in zip(nearest, steps[order[-1]], strict=True)]
    return order


def drawn(seed: int, tokens: int, twins: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(tokens, 5, generator=generator)
    return found[torch.randint(0, tokens // 2 + 1, (tokens,), generator=generator)] if twins else found


def order_of(ranks: Tensor, count: int) -> list[int]:
    return ranks.argsort(stable=True)[:count].tolist()


@pytest.mark.parametrize("distance", DISTANCES)
@given(seed=st.integers(0, 1000), tokens=st.integers(1, 20), twins=st.booleans())
def test_each_step_keeps_the_token_that_shortens_distances_most(
    distance: str, seed: int, tokens: int, twins: bool
) -> None:
    vectors = drawn(seed, tokens, twins)
    selector = FacilityLocation(distance=distance)  # type: ignore[arg-type]
    ranks = selector.ranks(torch.zeros(1, tokens), torch.ones(1, tokens, dtype=torch.bool), tokens, vectors[None])
    assert order_of(ranks[0], tokens) == slow_order(vectors, distance, tokens)


@pytest.mark.parametrize("distance", DISTANCES)
def test_of_three_points_the_middle_stands_for_all(distance: str) -> None:
    points = torch.tensor([[[1.0, 0.2], [1.0, 0.6], [1.0, 1.0]]])
    selector = FacilityLocation(distance=distance)  # type: ignore[arg-type]
    assert selector.ranks(torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool), 1, points).tolist() == [[1, 0, 1]]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("kind", ["any", "twins", "nan"])
def test_rows_by_themselves_keep_what_they_keep_together(
    kind: str, distance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = 150
    vectors = torch.stack([drawn(seed, tokens, kind == "twins") for seed in range(3)])
    if kind == "nan":
        vectors[torch.rand(3, tokens, generator=torch.Generator().manual_seed(0)) < 0.1] = torch.nan
    visual = torch.arange(tokens) < torch.tensor([[tokens], [90], [0]])
    selector = FacilityLocation(distance=distance)  # type: ignore[arg-type]
    for count in (1, 40, tokens):
        alone = selector.ranks(torch.zeros(3, tokens), visual, count, vectors)
        monkeypatch.setattr(lazy, "SHORT", tokens)
        together = selector.ranks(torch.zeros(3, tokens), visual, count, vectors)
        monkeypatch.undo()
        assert torch.equal(alone, together)
        assert (alone < count).sum(1).tolist() == [min(count, tokens), min(count, 90), 0]
