"""Whatever the scores and masks: the budgeted number of tokens that exist stays, and nobody else's."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from catp_lightning.methods.budget import even_counts, keep_count
from catp_lightning.methods.selectors import SELECTORS, Selector
from catp_lightning.methods.selectors.determinant import greedy_ranks
from tests.support.rules import INF, NAN

pytestmark = pytest.mark.usefixtures("no_grad")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAKES: list[Selector] = [
    *(cls() for name, cls in SELECTORS.items() if name != "pool"),
    *(SELECTORS["dpp"](relevance=strength) for strength in (-1.5, 0.0, 50.0, -200.0, 1e308)),  # type: ignore[call-arg]
    *(SELECTORS["dart"](pivots=pivots) for pivots in (1, 10**30)),  # type: ignore[call-arg]
    *(SELECTORS["context-merge"](context=share) for share in (0.0, 0.5, 1.0)),  # type: ignore[call-arg]
    *(SELECTORS["prune-similar"](important=share) for share in (0.0, 1.0)),  # type: ignore[call-arg]
]


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Tensor]:
    """Scores and vectors of a ragged batch, with ties and what is no number; which tokens exist, and a budget each."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    images, tokens = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 3, 7, 16, 40]))
    dtype = draw(st.sampled_from(DTYPES))
    shape = (images, tokens)
    uniform = lambda *more: torch.rand(*shape, *more, generator=generator, dtype=torch.float64)  # noqa: E731
    kind = draw(st.sampled_from(["any", "ties", "huge", "tiny", "equal", "spike"]))
    scores = {
        "any": uniform() * 4 - 2,
        "ties": (uniform() * 3).floor(),
        "huge": (uniform() - 0.5) * 2 * torch.finfo(dtype).max,
        "tiny": uniform() * torch.finfo(dtype).tiny,
        "equal": torch.zeros(shape, dtype=torch.float64),
        "spike": torch.zeros(shape, dtype=torch.float64).index_fill(1, torch.tensor([tokens - 1]), 1),
    }[kind]
    vectors = {
        "any": uniform(5) - 0.5,
        "ties": (uniform(3) * 2).floor(),
        "huge": (uniform(5) - 0.5) * 1e30,
        "zero": torch.zeros(*shape, 4, dtype=torch.float64),
    }[draw(st.sampled_from(["any", "ties", "huge", "zero"]))]
    for value in draw(st.sets(st.sampled_from([NAN, INF, -INF]))):
        scores = scores.masked_fill(uniform() < 0.2, value)
        vectors = vectors.masked_fill(uniform(1) < 0.2, value)
    visual = {
        "all": uniform() >= 0,
        "some": uniform() < 0.5,
        "none": uniform() < 0,
        "ragged": torch.arange(tokens) < (uniform()[:, :1] * tokens).ceil(),
        "one": torch.arange(tokens) == (uniform()[:, :1] * tokens).floor(),
    }[draw(st.sampled_from(["all", "some", "none", "ragged", "one"]))]
    counts = (uniform()[:, 0] * visual.sum(1)).ceil().long()
    return {"scores": scores.to(dtype), "visual": visual, "counts": counts, "vectors": vectors.float()}


def select(selector: Selector, given: Mapping[str, Tensor]) -> Tensor:
    return selector.select(given["scores"], given["visual"], given["counts"], given["vectors"]).keep


@pytest.mark.parametrize("selector", MAKES, ids=repr)
@settings(max_examples=settings.default.max_examples // 5)
@given(given=rows())
def test_a_selector_keeps_the_budgeted_number_of_tokens_that_exist_whatever_the_scores(
    selector: Selector, given: dict[str, Tensor]
) -> None:
    keep, visual, counts = select(selector, given), given["visual"], given["counts"]
    assert keep.dtype == torch.bool and not (keep & ~visual).any()
    kept = keep.sum(1)
    if type(selector) is SELECTORS["union"]:  # of several heads each has the budget
        assert (kept >= counts).all() and (kept <= visual.sum(1)).all()
    else:
        assert torch.equal(kept, counts)
    assert torch.equal(select(selector, given), keep), "the same again"
    if selector.merges:
        carrier = selector.select(given["scores"], visual, keep.sum(1), given["vectors"]).destination
        itself = torch.arange(keep.shape[1]).expand_as(keep)
        assert torch.equal(carrier[keep], itself[keep]), "what stays carries itself"
        assert (carrier[~visual] == -1).all()
        assert (keep.gather(1, carrier.clamp(min=0)) | (carrier < 0)).all(), "who carries others stays"


@pytest.mark.parametrize("selector", MAKES, ids=repr)
@settings(max_examples=settings.default.max_examples // 6)
@given(given=rows(), more=st.integers(1, 9))
def test_a_row_is_chosen_from_alone_whatever_stands_beside_it_and_after_it(
    selector: Selector, given: dict[str, Tensor], more: int
) -> None:
    together = select(selector, given)
    padded = {
        "scores": nn.functional.pad(given["scores"], (0, more), value=-INF),
        "visual": nn.functional.pad(given["visual"], (0, more)),
        "vectors": nn.functional.pad(given["vectors"], (0, 0, 0, more)),
        "counts": given["counts"],
    }
    longer = select(selector, padded)
    assert not longer[:, -more:].any()
    if isinstance(selector, ROUNDED):
        return
    assert torch.equal(longer[:, :-more], together), "padding"
    for row in range(len(together)):
        alone = select(selector, {name: value[row : row + 1] for name, value in given.items()})
        assert torch.equal(alone[0], together[row]), "the rest of the batch"


ROUNDED = (SELECTORS["dpp"], SELECTORS["conditional-dpp"])
"""Beyond the kernel's rank, and among tokens that are equal, what these gain is rounding, which differs by shape."""


@settings(max_examples=settings.default.max_examples // 5)
@given(seed=st.integers(0, 2**32), more=st.integers(1, 40), strength=st.sampled_from([-1.5, 0.0, 1.0, 200.0]))
def test_the_determinants_set_of_a_row_does_not_depend_on_padding_either_up_to_its_rank(
    seed: int, more: int, strength: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores, vectors = torch.randn(3, 20, generator=generator), torch.randn(3, 20, 12, generator=generator)
    visual, counts = torch.arange(20) < torch.tensor([[20], [15], [11]]), torch.tensor([10, 6, 11])
    for selector in (SELECTORS["dpp"](relevance=strength), SELECTORS["conditional-dpp"]()):  # type: ignore[call-arg]
        given = {"scores": scores.abs(), "visual": visual, "counts": counts, "vectors": vectors}
        together = select(selector, given)
        padded = {
            "scores": nn.functional.pad(scores.abs(), (0, more)),
            "visual": nn.functional.pad(visual, (0, more)),
            "vectors": nn.functional.pad(vectors, (0, 0, 0, more)),
            "counts": counts,
        }
        assert torch.equal(select(selector, padded)[:, :20], together)
        for row in range(3):
            alone = select(selector, {name: value[row : row + 1] for name, value in given.items()})
            assert torch.equal(alone[0], together[row])


def test_equal_scores_go_to_the_lowest_index_and_what_is_no_number_comes_last() -> None:
    visual, vectors = torch.ones(1, 300, dtype=torch.bool), torch.eye(300)[None]
    for name in ("top-k", "dpp", "conditional-dpp", "max-min", "union"):
        selector = SELECTORS[name]()
        given = {"scores": torch.ones(1, 300), "visual": visual, "counts": torch.tensor([90]), "vectors": vectors}
        if name == "union":
            given["vectors"] = torch.ones(1, 300, 2)
        assert select(selector, given)[0, :90].all(), name
    scores = torch.tensor([[NAN, 1.0, -INF, INF, 0.0, NAN]])
    kept = SELECTORS["top-k"]().select(scores, visual[:, :6], torch.tensor([3]), None).keep
    assert kept.tolist() == [[False, True, False, True, True, False]]


def test_a_strong_relevance_beside_diversity_still_ranks_by_score_where_its_exponential_has_no_number() -> None:
    generator = torch.Generator().manual_seed(1)
    scores, vectors = torch.randn(4, 60, generator=generator), torch.randn(4, 60, 4, generator=generator)
    visual = torch.ones(4, 60, dtype=torch.bool)
    best = scores == scores.amax(1, keepdim=True)
    for strength in (50.0, 1e4, 1e308):
        dpp = SELECTORS["dpp"](relevance=strength)  # type: ignore[call-arg]
        for count in (1, 8, 42, 60):
            keep = dpp.select(scores, visual, torch.full((4,), count), vectors).keep
            assert keep.sum(1).tolist() == [count] * 4
            assert keep[best].all(), "the highest score stays"


def test_a_relevance_whose_square_is_no_number_is_the_highest_and_spoils_no_other() -> None:
    scores = torch.tensor([[1.0, 1e200, 1e200, 2.0, NAN]], dtype=torch.float64)
    visual = torch.ones(1, 5, dtype=torch.bool)
    vectors = (torch.eye(5, dtype=torch.float64) + 0.3)[None]
    for count, kept in ((1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [0, 1, 2, 3])):
        keep = SELECTORS["conditional-dpp"]().select(scores, visual, torch.tensor([count]), vectors).keep
        assert keep[0].nonzero()[:, 0].tolist() == kept


def test_greedy_ranks_are_a_permutation_far_beyond_the_rank_of_the_kernel() -> None:
    vectors = torch.randn(2, 300, 3, generator=torch.Generator().manual_seed(0))
    quality = torch.exp(torch.linspace(-20, 20, 300))
    kernel = (vectors @ vectors.transpose(1, 2)) * quality[:, None] * quality
    ranks = greedy_ranks(kernel, torch.ones(2, 300, dtype=torch.bool), 300)
    assert torch.equal(ranks.sort(1).values, torch.arange(300).expand(2, 300))


@given(st.floats(0, 1, exclude_min=True) | st.integers(1, 2**63 - 1), st.integers(0, 10**6))
def test_a_budget_is_at_least_one_and_at_most_all_and_grows_with_itself(keep: float, tokens: int) -> None:
    count = keep_count(keep, tokens)
    assert type(count) is int and min(1, tokens) <= count <= tokens
    if isinstance(keep, float):
        assert keep_count(min(1.0, keep * 1.5), tokens) >= count
        assert keep * tokens - 1e-6 <= count <= max(1, keep * tokens + 1)
    else:
        assert count == min(keep, tokens)
    assert keep_count(1.0, tokens) == tokens
    staged = [int(even_counts(keep, torch.tensor([tokens]), part)) for part in (1 / 3, 2 / 3, 1.0)]
    assert staged == sorted(staged, reverse=True) and staged[-1] == count
