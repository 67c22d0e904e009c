"""Every selector against a slow version of its definition."""

import math

import pytest
import torch
from torch import Tensor

from catp_lightning.methods.budget import keep_count
from catp_lightning.methods.observation import Observation, Signal
from catp_lightning.methods.selectors import SELECTORS
from catp_lightning.methods.selectors.determinant import greedy_ranks
from catp_lightning.methods.selectors.dpp import DPP
from catp_lightning.methods.selectors.similarity import cosine_similarity
from catp_lightning.methods.selectors.top_k import TopK


def slow_greedy(kernel: Tensor, count: int) -> set[int]:
    """Adds, one at a time, the token that makes the determinant of the chosen block largest."""
    chosen: list[int] = []
    kernel = kernel + 1e-4 * torch.eye(len(kernel), dtype=kernel.dtype)
    for _ in range(count):
        rest = [token for token in range(len(kernel)) if token not in chosen]
        value = lambda token: torch.linalg.det(kernel[[*chosen, token]][:, [*chosen, token]]).item()  # noqa: E731
        chosen.append(max(rest, key=value))
    return set(chosen)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_greedy_ranks_are_the_greedy_determinant(count: int) -> None:
    vectors = torch.randn(8, 9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kernel = vectors @ vectors.transpose(1, 2)
    keep = greedy_ranks(kernel, torch.ones(8, 9, dtype=torch.bool), count) < count
    for row in range(8):
        assert set(keep[row].nonzero()[:, 0].tolist()) == slow_greedy(kernel[row], count)


def test_the_dpp_kernel_weighs_relevance_against_similarity() -> None:
    generator = torch.Generator().manual_seed(2)
    vectors = torch.randn(4, 7, 5, dtype=torch.float64, generator=generator)
    scores = torch.randn(4, 7, dtype=torch.float64, generator=generator)
    visual, counts = torch.ones(4, 7, dtype=torch.bool), torch.full((4,), 3)
    for strength in (-2.0, 0.0, 0.7):
        keep = DPP(relevance=strength).select(scores, visual, counts, vectors).keep
        for row in range(4):
            unit = vectors[row] / vectors[row].norm(dim=-1, keepdim=True)
            standard = (scores[row] - scores[row].mean()) / scores[row].std(correction=0)
            quality = torch.diag(torch.exp(strength * standard / 2))
            similarity = (unit @ unit.T).fill_diagonal_(1)
            assert set(keep[row].nonzero()[:, 0].tolist()) == slow_greedy(quality @ similarity @ quality, 3)
    strongly = DPP(relevance=200.0).select(scores, visual, counts, vectors).keep
    assert torch.equal(strongly, TopK().select(scores, visual, counts, None).keep), "relevance alone is top-k"


@pytest.mark.parametrize("layers", [None, (1,), (0, 2)])
def test_regions_compare_maps_by_the_inner_product_weighted_by_attention_received(
    layers: tuple[int, ...] | None,
) -> None:
    generator = torch.Generator().manual_seed(4)
    received = torch.rand(2, 7, dtype=torch.float64, generator=generator)
    values: dict[Signal | tuple[Signal, int], Tensor] = {Signal.VISION_ATTENTION_RECEIVED: received}
    for layer in range(3):
        values[Signal.CROSS_ATTENTION, layer] = torch.rand(2, 2, 5, 7, dtype=torch.float64, generator=generator)
    seen = Observation.of_equal(2, 5, {Signal.CROSS_ATTENTION: 3}, values)
    selector = DPP(similarity="regions", layers=layers)
    found = cosine_similarity(selector.vectors(seen))

    def product(image: int, one: int, other: int) -> float:
        total = 0.0
        for layer in range(3) if layers is None else layers:
            maps = values[Signal.CROSS_ATTENTION, layer][image]
            for head in range(2):
                for patch in range(7):
                    weight = float(received[image, patch])
                    total += weight * float(maps[head, one, patch]) * float(maps[head, other, patch])
        return total

    for image in range(2):
        for one in range(5):
            for other in range(5):
                norms = math.sqrt(product(image, one, one) * product(image, other, other))
                assert float(found[image, one, other]) == pytest.approx(product(image, one, other) / norms, abs=1e-12)
    assert selector.needs == {Signal.CROSS_ATTENTION: layers, Signal.VISION_ATTENTION_RECEIVED: None}
    plain = cosine_similarity(DPP(layers=layers).vectors(seen))
    assert (plain - found).abs().max() > 0.01, "the weights matter"


def test_a_twin_is_worth_nothing_to_diversity() -> None:
    vectors = torch.eye(4, dtype=torch.float64)[None].clone()
    vectors[0, 1] = vectors[0, 0]  # tokens 0 and 1 look at the same thing
    scores, visual = torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)
    keep = DPP(relevance=0.0).select(scores, visual, torch.tensor([3]), vectors).keep
    assert keep.tolist() == [[True, False, True, True]]


def test_the_union_at_equal_rows_is_what_heads_pick_in_turn_until_the_budget_is_reached() -> None:
    generator = torch.Generator().manual_seed(5)
    heads, scores = torch.rand(6, 12, 3, generator=generator), torch.rand(6, 12, generator=generator)
    visual = torch.rand(6, 12, generator=generator) < 0.8
    for count in (1, 2, 5):
        keep = SELECTORS["union"](budget="rows").select(scores, visual, torch.full((6,), count), heads).keep
        assert (keep.sum(1) == count).all() and not (keep & ~visual).any()
        for row in range(6):
            there = visual[row].nonzero()[:, 0].tolist()
            picked: list[int] = []
            orders = [sorted(there, key=lambda token: -heads[row, token, head]) for head in range(3)]
            for turn in range(len(there)):
                new = {order[turn] for order in orders} - set(picked)
                picked += sorted(new, key=lambda token: -scores[row, token])
            assert set(keep[row].nonzero()[:, 0].tolist()) == set(picked[:count])


def test_the_union_keeps_what_any_head_ranks_high_and_nothing_else() -> None:
    heads = torch.tensor([[[4.0, 3, 2, 1, 0], [0, 1, 2, 3, 4], [4, 3, 2, 1, 9]]]).transpose(1, 2)
    visual = torch.tensor([[True, True, True, True, False]])
    keep = SELECTORS["union"]().select(torch.zeros(1, 5), visual, torch.tensor([2]), heads).keep
    assert keep.tolist() == [[True, True, True, True, False]]  # the first two, the last two that exist, the first two
    keep = SELECTORS["union"]().select(torch.zeros(1, 5), visual, torch.tensor([1]), heads).keep
    assert keep.tolist() == [[True, False, False, True, False]]


def test_a_share_that_is_a_whole_number_of_tokens_is_not_rounded_up_by_floating_point() -> None:
    assert [keep_count(share / 100, 100) for share in range(1, 101)] == list(range(1, 101))
