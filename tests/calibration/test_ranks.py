"""Candidates' sets are what each rule keeps by itself, whatever the precision."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from catp_lightning import PruningPolicy
from catp_lightning.calibration.search import ranks as sets
from catp_lightning.calibration.search.candidate import Candidate
from catp_lightning.calibration.search.ranks import token_ranks
from catp_lightning.methods.budget import keep_count
from catp_lightning.methods.method import score_tokens, select_tokens
from catp_lightning.methods.observation import Observation, Signal
from catp_lightning.methods.routing import Routed
from tests.support.questions import routed


def signals(images: int, seed: int, levels: int | None, dtype: torch.dtype) -> Observation:
    """Random; with few levels many tokens tie."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        values = torch.rand(shape, generator=generator, dtype=torch.float64)
        return (values if levels is None else (values * levels).ceil() / levels).to(dtype)

    values: dict[Signal | tuple[Signal, int], Tensor] = {
        Signal.VISION_ATTENTION_RECEIVED: draw(images, 5),
        Signal.IMAGE_FEATURES: draw(images, 8, 6) - 0.5,
        Signal.IMAGE_EMBEDS: draw(images, 8, 6) - 0.5,
        Signal.TEXT_EMBEDS: draw(images, 3, 6) - 0.5,
        Signal.IMAGE_HASH: torch.randint(-(2**62), 2**62, (images,), generator=generator),
    }
    for layer in range(4):
        maps = draw(images, 4, 8, 5)
        values[Signal.CROSS_ATTENTION, layer] = maps / maps.sum(-1, keepdim=True)
        values[Signal.SELF_ATTENTION, layer] = draw(images, 4, 8)
    seen = Observation.of_equal(images, 8, {Signal.CROSS_ATTENTION: 2, Signal.SELF_ATTENTION: 4}, values)
    return replace(seen, text=torch.ones(images, 3, dtype=torch.bool))


@pytest.mark.slow
@settings(max_examples=4)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=4),
    st.integers(0, 10**6),
    st.sampled_from([None, 2, 5]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from([1, 1500, 2**20]),
    st.sampled_from([8, 4, 3, 1]),
)
def test_all_rules_together_keep_what_each_keeps_by_itself(
    candidates: list[Candidate],
    images: list[int],
    seed: int,
    levels: int | None,
    dtype: torch.dtype,
    kernels: int,
    count: int,
) -> None:
    """At every budget, for samples of no, one and two images, however many kernels are solved at a time."""
    seen = signals(sum(images), seed, levels, dtype)
    visual = torch.arange(8 * max(images)) < 8 * torch.tensor(images)[:, None]
    rules = [candidate.policy(1.0) for candidate in candidates]
    budgets: list[int | float] = [count, 0.6]
    most = max(keep_count(keep, 8) for keep in budgets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sets, "KERNELS", kernels)
        ranks = token_ranks([rule.method() for rule in rules], seen, visual, most)
    assert ranks.shape == (len(rules), *visual.shape)
    for candidate, rule, rank in zip(candidates, rules, ranks, strict=True):
        scores = score_tokens(rule.build_scorer(), seen, visual)
        for keep in budgets:
            expected = visual  # nothing to choose from
            if visual.any():
                expected = select_tokens(scores, rule.build_selector(), keep, seen, visual).keep
            assert torch.equal(rank < keep_count(keep, 8), expected), (candidate.name, keep)


def test_autocast_changes_no_rank(candidates: list[Candidate]) -> None:
    """Half precision would round similarities and weighted scores until ties decide."""
    seen, visual = signals(64, 0, None, torch.float32), torch.ones(64, 8, dtype=torch.bool)
    rules = [candidate.policy(1.0) for candidate in candidates]
    plain = token_ranks([rule.method() for rule in rules], seen, visual, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(token_ranks([rule.method() for rule in rules], seen, visual, 4), plain)
        rule = PRUNED.policy(4)
        scores = score_tokens(rule.build_scorer(), seen, visual)
        alone = select_tokens(scores, rule.build_selector(), 4, seen, visual).keep
    ranks = token_ranks([rule.method()], seen, visual, 4)
    assert torch.equal(alone, ranks[0] < 4), "and pruning chooses what was measured"


PRUNED = Candidate("", "catp", {"image_weight": "received"}, "dpp", {"similarity": "regions", "relevance": 1.5})


@pytest.mark.slow
def test_a_routing_ranks_each_image_as_the_rule_that_its_question_takes(candidates: list[Candidate]) -> None:
    """At every budget; the images of a sample share its question."""
    images = torch.tensor([2, 0, 1, 1, 2, 1, 1])
    seen, visual = signals(8, 3, None, torch.float64), torch.arange(16) < 8 * images[:, None]
    draw = torch.Generator().manual_seed(1)
    asked = torch.randn(7, 32, generator=draw, dtype=torch.float64).repeat_interleave(images, 0)
    seen = replace(seen, values={**seen.values, Signal.QUESTION: asked})
    nested = [one for one in candidates if one.policy(1.0).method().nested]
    several = [nested[at : at + 3] for at in range(0, len(nested) - 3, 7)]
    names = ("scorer", "scorer_args", "selector", "selector_args")
    plain = [[{name: getattr(one, name) for name in names} for one in some] for some in several]
    rules = [PruningPolicy(**routed(*some, seed=number)).method() for number, some in enumerate(plain)]
    assert any(len(method.router.routes(seen).unique()) == 3 for method in rules if isinstance(method, Routed))
    ranks = token_ranks([*rules, *rules[0].rules], seen, visual, 8)
    for method, rank in zip(rules, ranks, strict=False):
        assert method.nested
        for keep in range(1, 9):
            assert torch.equal(rank < keep, method.select(seen, keep, visual).keep)
    alone = ranks[len(rules) :]
    routes = rules[0].router.routes(seen)[(images.cumsum(0) - images)[images > 0]]
    for sample, route in zip(images.nonzero()[:, 0].tolist(), routes.tolist(), strict=True):
        assert torch.equal(ranks[0, sample], alone[route, sample])
