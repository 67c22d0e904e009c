"""Similarities that are the same wherever two tokens stand, and DPPs that equal tokens gain equally in."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from catp_lightning.methods.selectors.determinant import RIDGE, _choose, _steps
from catp_lightning.methods.selectors.similarity import (
    exact_similarity,
    exact_units,
    squared_distances,
    whole_units,
    whole_vectors,
)

pytestmark = pytest.mark.usefixtures("no_grad")


def drawn(rows: int, tokens: int, features: int, seed: int) -> Tensor:
    return torch.randn(rows, tokens, features, generator=torch.Generator().manual_seed(seed))


def start(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Gains of all tokens before the first step, and that each may be chosen."""
    return kernel.diagonal(dim1=1, dim2=2) + RIDGE, torch.zeros(kernel.shape[:2], dtype=torch.bool)


@pytest.mark.parametrize("tokens", [7, 64, 101, 200])
def test_similarities_depend_neither_on_the_order_nor_on_the_batch(tokens: int) -> None:
    vectors, order = drawn(3, tokens, 200, tokens), torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    found = exact_similarity(vectors)
    assert torch.equal(exact_similarity(vectors[:, order]), found[:, order][:, :, order])
    assert torch.equal(exact_similarity(vectors[1:2])[0], found[1])
    wide = vectors.double()
    plain = wide / wide.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(found, plain @ plain.mT, rtol=0, atol=1e-7)
    units = exact_units(vectors)
    torch.testing.assert_close(units @ units.mT, found, rtol=0, atol=1e-13)


def test_what_has_no_direction_is_similar_to_nothing_but_itself() -> None:
    vectors = drawn(1, 5, 8, 0)
    vectors[0, 1], vectors[0, 2], vectors[0, 3, 0] = 0, torch.inf, torch.nan
    found = exact_similarity(vectors)[0]
    assert torch.equal(found[1:4], torch.eye(5, dtype=torch.float64)[1:4]) and found[0, 4] == found[4, 0] != 0
    assert torch.equal(exact_units(vectors)[0, 1:4], torch.zeros(3, 8, dtype=torch.float64))


@pytest.mark.parametrize("tokens", range(66, 130, 7))
def test_equal_tokens_gain_equally_at_every_step(tokens: int) -> None:
    of = torch.randint(0, tokens // 2, (tokens,), generator=torch.Generator().manual_seed(tokens))
    kernel = exact_similarity(drawn(1, tokens // 2, 96, tokens)[:, of])
    chosen, _, factors = _steps(kernel, *start(kernel), 20)
    left = [token for token in range(tokens) if token not in chosen]
    first = {int(of[token]): token for token in reversed(left)}
    assert len(first) < len(left)
    for token in left:
        assert torch.equal(factors[0, :, token], factors[0, :, first[int(of[token])]])


@pytest.mark.parametrize(("rows", "tokens"), [(1, 9), (2, 70), (6, 40), (5, 65)])
def test_rows_one_by_one_are_as_rows_together(rows: int, tokens: int) -> None:
    kernel = exact_similarity(drawn(rows, tokens, 12, rows))
    gain, closed = start(kernel)
    closed[:, ::3] = True
    found = tuple(torch.empty_like(value) for value in _steps(kernel, gain.clone(), closed.clone(), 8))
    _choose(kernel, gain.clone(), closed.clone(), *found)
    chosen, gains, factors = _steps(kernel, gain, closed, 8)
    assert torch.equal(chosen, found[0])
    torch.testing.assert_close((gains, factors), found[1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("whole", [whole_units, lambda vectors: whole_vectors(vectors)[0]], ids=["units", "vectors"])
def test_distances_are_those_of_whole_numbers_in_both_directions(whole: Callable[[Tensor], Tensor]) -> None:
    vectors = drawn(1, 60, 4096, 2)
    vectors[0, 30:] = -vectors[0, :30]  # as far apart as vectors can be
    own = whole(vectors)
    numbers = own[0].long()
    found = squared_distances(own)[0]
    assert torch.equal(found, found.T)
    for token in (0, 17, 30, 47):
        assert torch.equal(found[token].long(), (numbers - numbers[token]).square().sum(1))
