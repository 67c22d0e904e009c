"""Budgets for a price: the largest whose mean price is not above a share of the unpruned model's."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from catp_lightning import PruningPolicy
from catp_lightning.models import find_family
from catp_lightning.policy import Stage
from catp_lightning.pricing import COUNTED, Prices, Prompts, Unit, keep_at, largest, tokens_read
from tests.support.families import BY_NAME

TOKENS = torch.tensor([96, 120, 40, 0, 96])
PROMPTS = Prompts.of(torch.tensor([12, 30, 7, 9, 15]), TOKENS)
DEEP = Prices("decoder", 12)
SCHEDULES = [
    PruningPolicy("l2-norm"),
    PruningPolicy("fastv", {"layer": 2}),
    PruningPolicy("pyramiddrop", {"stages_at": [1, 2]}),
    PruningPolicy("l2-norm", then=(Stage("visual-exit", {"layer": 2}),)),
]


@pytest.mark.parametrize("share", [0.9, 0.5, 0.3])
@pytest.mark.parametrize("unit", COUNTED)
@pytest.mark.parametrize("policy", SCHEDULES, ids=lambda policy: policy.scorer + "-then" * len(policy.then))
def test_the_budget_is_the_largest_that_costs_at_most_the_share(
    policy: PruningPolicy, unit: Unit, share: float
) -> None:
    prices = Prices.of(find_family(BY_NAME["Llava"].model(torch.float32)))

    def paid(keep: float) -> float:
        read = tokens_read(replace(policy, keep=keep).steps(), TOKENS, prices.depth)
        return prices.share(unit, PROMPTS, read)

    keep = keep_at(
        prices, unit, share, PROMPTS, lambda keep: tokens_read(replace(policy, keep=keep).steps(), TOKENS, prices.depth)
    )
    if keep is None:
        assert paid(1e-6) > share
    else:
        assert paid(keep) <= share
        assert keep == 1.0 or paid(min(1.0, keep + 1 / 96)) > share or paid(keep) == paid(1.0 - 1e-9)


def test_a_price_that_layers_before_the_first_stage_exceed_cannot_be_reached() -> None:
    def counts(layer: int, keep: float) -> torch.Tensor:
        return tokens_read(PruningPolicy("fastv", {"layer": layer}, keep=keep).steps(), TOKENS, 12)

    assert keep_at(DEEP, "tokens_per_layer", 1 / 8, PROMPTS, lambda keep: counts(8, keep)) is None
    found = keep_at(DEEP, "tokens_per_layer", 1 / 4, PROMPTS, lambda keep: counts(1, keep))
    assert found == pytest.approx((12 / 4 - 1) / 11, abs=0.01)


def test_a_budget_has_few_decimals() -> None:
    tokens = torch.full((3,), 96)
    prompts = Prompts.of(torch.full((3,), 5), tokens)
    found = keep_at(
        DEEP, "tokens", 0.25, prompts, lambda keep: tokens_read(PruningPolicy(keep=keep).steps(), tokens, 12)
    )
    assert found == 0.25


@given(st.integers(1, 400), st.integers(1, 400))
def test_all_numbers_of_tokens_are_found(tokens: int, limit: int) -> None:
    found = largest(lambda keep: max(1, -(-keep * tokens // 1)), limit)
    assert found is not None and -(-found * tokens // 1) == min(limit, tokens)


def test_tokens_read_are_those_of_each_sample() -> None:
    steps = PruningPolicy("fastv", {"layer": 1}, keep=0.5).steps()
    assert tokens_read(steps, TOKENS, 2).tolist() == [[96, 48], [120, 60], [40, 20], [0, 0], [96, 48]]
