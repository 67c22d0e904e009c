"""Rows of more tokens than are compared all with all: the same choice as from the whole kernel."""

import numpy as np
import pytest
import torch
from torch import Tensor

from catp_lightning.methods.selectors import SELECTORS, prune_similar
from catp_lightning.methods.selectors.determinant import exact_similarity, greedy_ranks
from catp_lightning.methods.selectors.dpp import DPP
from catp_lightning.methods.selectors.lazy import AT_ONCE, grow
from catp_lightning.methods.selectors.nearest import AllPairs, Neighbours
from catp_lightning.methods.selectors.prune_similar import PruneSimilar
from catp_lightning.methods.selectors.similarity import most_similar, rounded_similarity
from tests.support.slow_determinant import shortfall, slow_greedy_ranks
from tests.support.waiting import as_on_gpu

pytestmark = pytest.mark.usefixtures("no_grad")
TOKENS, STEPS = AT_ONCE + 76, 150
QUICK = {("twins", 1.0), ("low rank", 0.0), ("nan", -1.5)}


def vectors_of(kind: str) -> Tensor:
    """Vectors of three rows: float [3, TOKENS, F]."""
    generator = torch.Generator().manual_seed(3)
    found = torch.randn(3, TOKENS, 200, generator=generator)
    if kind == "twins":
        return found[:, torch.randint(0, 400, (TOKENS,), generator=generator)]
    if kind == "low rank":
        return found[..., :20] @ torch.randn(20, 64, generator=generator)
    if kind == "nan":
        return found.masked_fill(torch.rand(3, TOKENS, 1, generator=generator) < 0.05, torch.nan)
    return found.bfloat16() if kind == "bf16" else found


@pytest.mark.parametrize(
    ("kind", "relevance"),
    [
        pytest.param(kind, relevance, marks=() if (kind, relevance) in QUICK else pytest.mark.slow)
        for kind in ("any", "twins", "low rank", "nan", "bf16")
        for relevance in (0.0, 1.0, -1.5)
    ],
)
def test_every_step_takes_a_token_of_the_largest_gain(kind: str, relevance: float) -> None:
    vectors, scores = vectors_of(kind), torch.randn(3, TOKENS, generator=torch.Generator().manual_seed(5))
    visual = torch.arange(TOKENS) % 50 < torch.tensor([[50], [49], [48]])
    selector = DPP(relevance=relevance, similarity="outputs")
    ranks = selector.ranks(scores, visual, STEPS, vectors)
    kernel = selector.kernel(scores, visual, exact_similarity(vectors))
    for row in range(3):
        own = visual[row].nonzero()[:, 0]
        order = ranks[row, own].argsort()[:STEPS]
        assert torch.equal(ranks[row, own[order]], torch.arange(STEPS))
        assert shortfall(kernel[row][own][:, own], order) < 1e-9
        assert (ranks[row, ~visual[row]] == STEPS).all()
    if kind in ("any", "nan", "bf16"):
        assert torch.equal(ranks, slow_greedy_ranks(kernel, visual, STEPS))


@pytest.mark.slow
def test_a_long_row_is_chosen_from_alone_whatever_stands_beside_it_and_after_it() -> None:
    vectors, scores = vectors_of("twins"), torch.rand(3, TOKENS, generator=torch.Generator().manual_seed(6))
    visual = torch.arange(TOKENS) < torch.tensor([[TOKENS], [AT_ONCE + 1], [700]])
    for selector in (DPP(relevance=0.7, similarity="outputs"), SELECTORS["conditional-dpp"]()):
        together = selector.ranks(scores, visual, STEPS, vectors)
        for row in range(3):
            count = int(visual[row].sum())
            short = (scores[row, :count][None], visual[row, :count][None], STEPS, vectors[row, :count][None])
            assert torch.equal(selector.ranks(*short)[0], together[row, :count])


def test_of_equal_gains_the_lowest_index_wins_and_a_row_may_have_fewer_tokens_than_steps() -> None:
    visual = torch.ones(2, TOKENS, dtype=torch.bool)
    visual[1, 90:] = False
    ranks = DPP(similarity="outputs").ranks(torch.ones(2, TOKENS), visual, STEPS, torch.eye(TOKENS).expand(2, -1, -1))
    assert torch.equal(ranks[0], torch.arange(TOKENS).clamp(max=STEPS))
    assert torch.equal(ranks[1, :90], torch.arange(90)) and (ranks[1, 90:] == STEPS).all()


@pytest.mark.slow
@pytest.mark.parametrize("relevance", [1e308, 200.0, -200.0])
def test_beyond_what_a_kernel_can_hold_the_number_of_tokens_is_still_right(relevance: float) -> None:
    scores = torch.randn(3, TOKENS, generator=torch.Generator().manual_seed(5))
    visual = torch.ones(3, TOKENS, dtype=torch.bool)
    ranks = DPP(relevance=relevance, similarity="outputs").ranks(scores, visual, STEPS, vectors_of("low rank"))
    assert torch.equal(ranks.sort(1).values[:, :STEPS], torch.arange(STEPS).expand(3, -1))


@pytest.mark.parametrize("steps", [0, 1, 9, 40])
def test_ranks_of_a_kernel_are_bit_equal_to_the_slow_ones(steps: int) -> None:
    generator = torch.Generator().manual_seed(steps)
    for features in (3, 60):
        vectors = torch.randn(5, 40, features, generator=generator)[:, torch.randint(0, 40, (40,), generator=generator)]
        kernel = exact_similarity(vectors) * 3
        visual = torch.rand(5, 40, generator=generator) < torch.tensor([[1.0], [0.9], [0.5], [0.2], [0.0]])
        assert torch.equal(greedy_ranks(kernel, visual, steps), slow_greedy_ranks(kernel, visual, steps))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["any", "twins", "nan", "bf16"])
def test_the_most_similar_target_of_a_long_row_is_that_among_all_pairs(kind: str) -> None:
    vectors = vectors_of(kind)
    target = torch.arange(TOKENS) % 20 < torch.tensor([[3], [1], [0]])
    expected = rounded_similarity(vectors).masked_fill(~target[:, None], -torch.inf).argmax(2)
    assert torch.equal(most_similar(vectors, target), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "share"), [("any", 0.0), ("twins", 0.5), ("low rank", 0.5), ("nan", 0.5), ("bf16", 0.5)]
)
def test_of_a_long_row_the_unlike_stay_that_stay_when_all_pairs_are_compared(
    kind: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, scores = vectors_of(kind).float(), torch.rand(3, TOKENS, generator=torch.Generator().manual_seed(6))
    visual = torch.arange(TOKENS) < torch.tensor([[TOKENS], [AT_ONCE + 1], [700]])
    counts = torch.tensor([TOKENS // 2, 600, 690])
    found = PruneSimilar(important=share).select(scores, visual, counts, vectors).keep
    monkeypatch.setattr(prune_similar, "at_once", lambda vectors: True)
    assert torch.equal(found, PruneSimilar(important=share).select(scores, visual, counts, vectors).keep)
    assert torch.equal(found.sum(1), counts) and not (found & ~visual).any()


def test_tokens_without_a_listed_neighbour_among_the_others_are_compared_with_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Neighbours, "LISTED", 1)
    vectors = vectors_of("any")[0]
    tokens, others = np.arange(0, TOKENS, 3), np.arange(1, TOKENS, 3)[:300]
    assert np.array_equal(Neighbours(vectors)(tokens, others), AllPairs(vectors)(tokens, others))


class Coverage:
    """Tokens that each cover some items, for `grow`: a token gains the number of items that it alone covers."""

    def __init__(self, covers: Tensor) -> None:
        self.covers, self.covered = covers, torch.zeros_like(covers[0])  # bool [n, items]
        self.gain = covers.sum(1).double()

    def ahead(self, tokens: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        order, gains = plain_coverage(self.covers[tokens], self.covered, steps)
        return tokens[order], gains

    def add(self, tokens: Tensor) -> None:
        self.covered = self.covered | self.covers[tokens].any(0)
        closed = self.gain == -torch.inf
        self.gain = (self.covers & ~self.covered).sum(1).double().masked_fill(closed, -torch.inf)
        self.gain[tokens] = -torch.inf


def plain_coverage(covers: Tensor, covered: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Every token's gain at every step: the tokens chosen, int64 [steps], and their gains."""
    closed, order, gains = torch.zeros(len(covers), dtype=torch.bool), [], []
    for _ in range(steps):
        gain = (covers & ~covered).sum(1).double().masked_fill(closed, -torch.inf)
        order.append(int(gain.argmax()))
        gains.append(float(gain[order[-1]]))
        closed[order[-1]], covered = True, covered | covers[order[-1]]
    return torch.tensor(order), torch.tensor(gains, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(4))
def test_only_tokens_that_may_be_next_are_looked_at_and_ties_are_settled_as_if_all_were(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    covers = torch.rand(600, 600, generator=generator) < 0.02
    order, _ = plain_coverage(covers, torch.zeros_like(covers[0]), 100)
    assert torch.equal(grow(Coverage(covers), 100), order)


@pytest.mark.parametrize("tokens", [12, 70])
@pytest.mark.parametrize("name", ["dpp", "max-min", "prune-similar"])
def test_a_gpu_is_sent_operations_that_choose_as_those_of_numpy_do(name: str, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    vectors = torch.randn(4, tokens, 24, generator=generator)[
        :, torch.randint(0, tokens, (tokens,), generator=generator)
    ]
    vectors[1, 3], scores = torch.nan, torch.rand(4, tokens, generator=generator)
    visual = torch.rand(4, tokens, generator=generator) < torch.tensor([[1.0], [1.0], [0.6], [0.0]])
    selector = DPP(similarity="outputs") if name == "dpp" else SELECTORS[name]()
    for share in (0.1, 0.5, 1.0):
        counts = (visual.sum(1) * share).long()
        found = selector.select(scores, visual, counts, vectors).keep
        with as_on_gpu():
            assert torch.equal(found, selector.select(scores, visual, counts, vectors).keep)
        assert torch.equal(found.sum(1), counts)
