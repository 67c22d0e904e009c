"""SparseVLM against slow versions of its definition, written with loops and plain numbers."""

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from catp_lightning import PruningPolicy, prune
from catp_lightning.methods.budget import keep_count
from catp_lightning.methods.observation import Observation, Signal
from catp_lightning.methods.scorers import sparsevlm
from catp_lightning.methods.scorers.sparsevlm import SparseVLM, raters
from tests.support.families import BY_NAME
from tests.support.matrix import exact
from tests.support.plain_numbers import Rows, attended

pytestmark = pytest.mark.usefixtures("no_grad")
seeds = given(st.integers(0, 10**6))


def raters_by_hand(read: Rows, text: Rows) -> list[int]:
    """Text rows whose mean share of the visual tokens' softmax exceeds the average; all of them where none does."""
    relevance = [0.0] * len(text)
    for token in read:
        products = [sum(a * b for a, b in zip(token, row, strict=True)) for row in text]
        powers = [math.exp(product - max(products)) for product in products]
        for place, power in enumerate(powers):
            relevance[place] += power / sum(powers) / len(read)
    average = sum(relevance) / len(text)
    return [place for place, own in enumerate(relevance) if own > average + 1e-7] or list(range(len(text)))


def raters_of(seen: Observation, sample: int) -> list[int]:
    assert seen.text is not None
    read = [row for row in seen[Signal.IMAGE_EMBEDS][sample].tolist() if any(row)]
    return raters_by_hand(read, seen[Signal.TEXT_EMBEDS][sample, : int(seen.text[sample].sum())].tolist())


@seeds
def test_sparsevlm_scores_are_the_mean_attention_of_the_raters(seed: int) -> None:
    seen = attended(seed, layers=2)
    weights = ((0.5, -1.0), (2.0, 0.25))
    plain, weighted = SparseVLM().score(seen), SparseVLM(layers=(0, 1), head_weights=weights).score(seen)
    for sample in range(3):
        rating = raters_of(seen, sample)
        paid = [seen.values[Signal.TEXT_TO_IMAGE_ATTENTION, layer][sample].tolist() for layer in (0, 1)]
        for token in seen.valid[sample].nonzero()[:, 0].tolist():
            mean = [
                [sum(paid[layer][head][rater][token] for rater in rating) / len(rating) for head in (0, 1)]
                for layer in (0, 1)
            ]
            assert plain[sample, token].item() == pytest.approx(sum(mean[1]), abs=1e-6)
            expected = sum(weights[layer][head] * mean[layer][head] for layer in (0, 1) for head in (0, 1))
            assert weighted[sample, token].item() == pytest.approx(expected, abs=1e-6)


def test_raters_of_two_words_one_of_which_is_about_the_image() -> None:
    """By hand: of tokens (2, 0) and (0, 1), words (1, 0) and (0, 1) get e2 / (e2 + 1) = 0.88 and 0.27, mean 0.57."""
    values: dict[Any, Tensor] = {
        Signal.IMAGE_EMBEDS: torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]),
        Signal.TEXT_EMBEDS: torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]),
        (Signal.TEXT_TO_IMAGE_ATTENTION, 0): torch.tensor([[[[0.1, 0.3], [0.4, 0.2]]]]),
    }
    valid = torch.ones(1, 2, dtype=torch.bool)
    seen = Observation(valid, {Signal.TEXT_TO_IMAGE_ATTENTION: 1}, values, text=valid)
    exact(SparseVLM().score(seen), torch.tensor([[0.1, 0.3]]), atol=1e-7)
    values[Signal.TEXT_EMBEDS] = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])  # the same word twice: both rate
    exact(SparseVLM().score(replace(seen, made={})), torch.tensor([[0.25, 0.25]]), atol=1e-7)


def test_raters_are_chosen_once_a_prefill_and_anew_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Tensor] = []

    def noted(*given: Tensor) -> Tensor:
        chosen.append(raters(*given))
        return chosen[-1]

    row, policy = BY_NAME["Llava"], PruningPolicy("sparsevlm", {"stages_at": [1, 2]}, keep=2)
    model, prompts = row.model(), [row.inputs([0, 1]), row.inputs([2, 0])]

    def kept() -> list[Tensor]:
        with prune(model, policy) as pruning:
            return [pruning.keep for inputs in prompts if model(**inputs) and pruning.keep is not None]

    monkeypatch.setattr(sparsevlm, "raters", noted)
    together = kept()
    assert len(chosen) == 2 and not torch.equal(*chosen)
    monkeypatch.setattr(Observation, "once", lambda seen, name, make: make())  # at each stage
    assert all(torch.equal(*pair) for pair in zip(together, kept(), strict=True)) and len(chosen) == 6


def test_raters_are_the_same_under_autocast() -> None:
    """Products of 256.5 and 257 are equal in bfloat16, and then both words would rate."""
    read, text = torch.tensor([[[256.5, 257.0]]]), torch.eye(2)[None]
    valid = torch.ones(1, 2, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert raters(read, text, valid).tolist() == [[False, True]]


def test_attention_that_is_nan_counts_for_no_rank_and_ranks_last() -> None:
    seen = attended(0)
    seen.values[Signal.TEXT_TO_IMAGE_ATTENTION, 0][:, :, :, 0] = math.nan
    counts = SparseVLM(schedule="rank").stage_counts(1, torch.tensor([7, 7, 7]), 0, 3, seen)
    least = torch.tensor([max(1, min(6, int(own))) for own in seen.valid[:, 1:].sum(1)])
    assert (counts >= 1).all() and (counts <= least).all()


def counts_of(scorer: SparseVLM, keep: int | float, tokens: int, stages: int) -> list[int]:
    seen, own = Observation(torch.ones(1, tokens, dtype=torch.bool), {}), torch.tensor([tokens])
    return [int(scorer.stage_counts(keep, own, stage, stages, seen)) for stage in range(stages)]


@pytest.mark.parametrize("paper", [[300, 200, 110], [303, 110, 36], [66, 30, 17]], ids=str)
def test_the_budget_schedule_is_the_papers_at_its_budgets(paper: list[int]) -> None:
    assert counts_of(SparseVLM(), paper[-1], 576, 3) == paper
    assert counts_of(SparseVLM(), paper[-1] / 576, 576, 3) == paper, "shares are rounded up once"
    assert counts_of(SparseVLM(), paper[-1], 576, 1) == paper[-1:]
    between = math.ceil(math.sqrt(paper[0] * paper[1]))
    assert counts_of(SparseVLM(), paper[-1], 576, 2) == [between, paper[-1]]


def test_below_the_papers_least_budget_its_proportions_are_kept() -> None:
    exponents = [math.log(count / 576) / math.log(17 / 576) for count in (66, 30)]
    expected = [math.ceil(576 * (8 / 576) ** exponent) for exponent in exponents]
    assert counts_of(SparseVLM(), 8, 576, 3) == [*expected, 8] == [42, 16, 8]


@pytest.mark.parametrize("tokens", [1, 2, 9, 64, 576])
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_schedules_descend_to_the_budget(tokens: int, stages: int) -> None:
    for keep in [*range(1, tokens + 3), 0.001, 0.3, 1.0]:
        counts = counts_of(SparseVLM(), keep, tokens, stages)
        assert counts == sorted(counts, reverse=True) and counts[0] <= tokens
        assert counts[-1] == keep_count(keep, tokens)
    seen = Observation(torch.ones(2, 9, dtype=torch.bool), {})
    assert SparseVLM().stage_counts(0.5, torch.tensor([0, 9]), 0, 1, seen).tolist() == [0, 5]


def rank_by_hand(rows: list[list[Fraction]]) -> int:
    """Gaussian elimination with exact fractions."""
    rows, rank = [list(row) for row in rows], 0
    for column in range(len(rows[0]) if rows else 0):
        pivot = next((row for row in rows[rank:] if row[column]), None)
        if pivot is None:
            continue
        rows.remove(pivot)
        rows.insert(rank, pivot)
        for at in range(rank + 1, len(rows)):
            factor = rows[at][column] / pivot[column]
            rows[at] = [a - factor * b for a, b in zip(rows[at], pivot, strict=True)]
        rank += 1
    return rank


@pytest.mark.slow
@seeds
def test_the_rank_schedule_drops_a_share_of_the_tokens_beyond_the_rank(seed: int) -> None:
    seen, before = attended(seed), torch.tensor([7, 5, 7])
    for share, keep in ((1.0, 1), (0.5, 1), (0.7, 0.6)):
        counts = SparseVLM(schedule="rank", scale=share).stage_counts(keep, before, 0, 3, seen)
        for sample in range(3):
            there = seen.valid[sample].nonzero()[:, 0].tolist()
            paid = seen.values[Signal.TEXT_TO_IMAGE_ATTENTION, 0][sample].tolist()
            rows = [
                [Fraction(paid[0][rater][token]) + Fraction(paid[1][rater][token]) for token in there]
                for rater in raters_of(seen, sample)
            ]
            dropped = math.floor(share * (len(there) - rank_by_hand(rows)) + 1e-9)
            assert counts[sample] == max(len(there) - dropped, keep_count(keep, int(before[sample])))


def test_a_rank_of_one_leaves_the_budget() -> None:
    paid = torch.outer(torch.tensor([1.0, 2.0]), torch.arange(1.0, 11.0)) / 60
    values: dict[Any, Tensor] = {
        Signal.IMAGE_EMBEDS: torch.ones(1, 10, 2),
        Signal.TEXT_EMBEDS: torch.ones(1, 2, 2),
        (Signal.TEXT_TO_IMAGE_ATTENTION, 0): paid[None, None],
    }
    there = torch.ones(1, 10, dtype=torch.bool)
    seen = Observation(there, {Signal.TEXT_TO_IMAGE_ATTENTION: 1}, values, text=there[:, :2])
    found = [
        int(SparseVLM(schedule="rank", scale=share).stage_counts(keep, torch.tensor([10]), 0, 3, seen))
        for share, keep in ((1.0, 1), (1.0, 4), (0.5, 1), (2.0, 2))
    ]
    assert found == [1, 4, 6, 2]  # 10 - 9, the budget, 10 - 4 (of 4.5), the budget


def test_stages_are_at_the_same_parts_of_any_depth() -> None:
    found = {depth: SparseVLM().stages(depth) for depth in (2, 4, 28, 32, 40, 80)}
    assert found == {2: (1,), 4: (1, 2), 28: (2, 5, 13), 32: (2, 6, 15), 40: (2, 8, 19), 80: (5, 15, 38)}
    assert SparseVLM(stages_at=(3, 7)).stages(32) == (3, 7)
