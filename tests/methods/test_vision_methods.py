"""Methods that choose before the language model, each against a version with loops written from its definition."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from catp_lightning import PolicyError, PruningPolicy, prune
from catp_lightning.methods.observation import Observation, Signal, Values
from catp_lightning.methods.scorers import SCORERS
from catp_lightning.methods.scorers.vtc_cls import VTCCLS
from catp_lightning.methods.selectors import SELECTORS
from catp_lightning.methods.selectors.context_merge import ContextMerge
from catp_lightning.methods.selectors.prune_similar import PruneSimilar
from tests.support.oracles import cache_of
from tests.support.slow_selectors import (
    batch,
    drawn,
    slow_conditional_dpp,
    slow_context_merge,
    slow_max_min,
    slow_prune_similar,
)

NAMES = ("vtc-cls", "vispruner", "visionzip", "divprune", "cdpruner", "downsample")
COMPARED = ("prune-similar", "context-merge", "max-min", "conditional-dpp")
SIZES = st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 1.0)), min_size=1, max_size=4)


@pytest.mark.slow
@given(SIZES, st.integers(0, 1000), st.booleans(), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_vispruner_drops_of_pairs_the_one_most_similar_to_its_counterpart(
    sizes: list[tuple[int, float]], seed: int, tie: bool, share: float
) -> None:
    rows = [drawn(seed + n, tokens, tie) for n, (tokens, _) in enumerate(sizes)]
    counts = [math.ceil(keep * tokens) for tokens, keep in sizes]
    scores, vectors, visual = batch(rows)
    keep = PruneSimilar(important=share).select(scores, visual, torch.tensor(counts), vectors).keep
    for row, (own, features) in enumerate(rows):
        expected = slow_prune_similar(own, features, counts[row], share)
        assert set(keep[row].nonzero()[:, 0].tolist()) == expected and len(expected) == counts[row]


@given(SIZES, st.integers(0, 1000), st.booleans(), st.sampled_from([0.0, 10 / 64, 0.5, 1.0]))
def test_visionzip_merges_the_rest_into_the_evenly_spaced_most_similar(
    sizes: list[tuple[int, float]], seed: int, tie: bool, share: float
) -> None:
    rows = [drawn(seed + n, tokens, tie) for n, (tokens, _) in enumerate(sizes)]
    counts = [math.ceil(keep * tokens) for tokens, keep in sizes]
    scores, vectors, visual = batch(rows)
    selector = ContextMerge(context=share)
    keep = selector.select(scores, visual, torch.tensor(counts), vectors).keep
    carrier = selector.select(scores, visual, keep.sum(1), vectors).destination
    for row, (own, keys) in enumerate(rows):
        expected = slow_context_merge(own, keys, counts[row], share)
        assert carrier[row].tolist() == [expected.get(t, -1) for t in range(carrier.shape[1])]
        assert keep[row].tolist() == [expected.get(t, -1) == t for t in range(carrier.shape[1])]
        assert keep[row].sum() == counts[row]


@pytest.mark.slow
@given(SIZES, st.integers(0, 1000), st.booleans())
def test_divprune_adds_the_token_farthest_from_its_nearest(
    sizes: list[tuple[int, float]], seed: int, tie: bool
) -> None:
    rows = [drawn(seed + n, tokens, tie) for n, (tokens, _) in enumerate(sizes)]
    counts = [math.ceil(keep * tokens) for tokens, keep in sizes]
    scores, vectors, visual = batch(rows)
    ranks = SELECTORS["max-min"]().ranks(scores, visual, max(counts), vectors)
    keep = SELECTORS["max-min"]().select(scores, visual, torch.tensor(counts), vectors).keep
    for row, (_, features) in enumerate(rows):
        order = slow_max_min(features, counts[row])
        assert [int(ranks[row, token]) for token in order] == list(range(counts[row]))
        assert set(keep[row].nonzero()[:, 0].tolist()) == set(order)


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0.01, 0.6)), min_size=1, max_size=3), st.integers(0, 1000))
def test_cdpruner_is_the_greedy_determinant_of_relevance_and_similarity(
    sizes: list[tuple[int, float]], seed: int
) -> None:
    rows = [
        ([abs(s) for s in scores], v) for scores, v in (drawn(seed + n, t, False) for n, (t, _) in enumerate(sizes))
    ]
    counts = [math.ceil(keep * tokens) for tokens, keep in sizes]
    scores, vectors, visual = batch(rows)
    ranks = SELECTORS["conditional-dpp"]().ranks(scores, visual, max(counts), vectors)
    for row, (relevance, features) in enumerate(rows):
        order = slow_conditional_dpp(relevance, features, counts[row])
        assert [int(ranks[row, token]) for token in order] == list(range(counts[row]))


def test_relevance_of_cdpruner_is_the_cosine_with_the_mean_word_stretched_over_the_image() -> None:
    generator = torch.Generator().manual_seed(3)
    read = torch.randn(4, 5, 6, dtype=torch.float64, generator=generator)
    read[3] = read[3, :1] * torch.arange(1, 6)[:, None] / 7  # all tokens alike, but for rounding
    text = torch.randn(4, 3, 6, dtype=torch.float64, generator=generator)
    words = torch.tensor([[True, True, True], [True, False, False], [False] * 3, [True] * 3])
    valid = torch.arange(5) < torch.tensor([5, 3, 5, 5])[:, None]
    seen = Observation(valid, {}, {Signal.IMAGE_EMBEDS: read, Signal.TEXT_EMBEDS: text}, text=words)
    scores = SCORERS["cdpruner"]().score(seen)
    assert scores[2].tolist() == [1.0] * 5 and scores[3].tolist() == [1.0] * 5, "no text, and nothing to tell apart"
    for image, tokens in ((0, 5), (1, 3)):
        own = [text[image, w].tolist() for w in range(3) if words[image, w]]
        mean = [sum(word[d] for word in own) / len(own) for d in range(6)]
        near = [
            sum(x * y for x, y in zip(own_read, mean, strict=True)) / math.hypot(*own_read) / math.hypot(*mean)
            for own_read in read[image, :tokens].tolist()
        ]
        expected = [(one - min(near)) / (max(near) - min(near)) for one in near]
        assert scores[image, :tokens].tolist() == pytest.approx(expected, abs=1e-9)
    protected = torch.zeros_like(valid)
    protected[0, int(scores[0].argmax())] = True  # a line's end is no token of the image
    ends = SCORERS["cdpruner"]().score(Observation(valid, {}, seen.values, protected, text=words))
    assert ends[0][~protected[0]].max() == 1.0


def test_relevance_of_a_token_that_is_not_a_number_is_none() -> None:
    read = torch.randn(1, 4, 6)
    read[0, 1] = torch.nan
    seen = Observation.of_equal(1, 4, {}, {Signal.IMAGE_EMBEDS: read, Signal.TEXT_EMBEDS: torch.randn(1, 2, 6)})
    seen.text = torch.ones(1, 2, dtype=torch.bool)
    scores = SCORERS["cdpruner"]().score(seen)[0]
    assert scores[1].isnan() and sorted(scores[[0, 2, 3]].tolist())[::2] == [0.0, 1.0]


def attention(layers: int, tokens: int = 4) -> tuple[Observation, Tensor]:
    """Of some layers of a tower, and the maps: [L, I, H, T]."""
    maps = torch.rand(layers, 2, 3, tokens, dtype=torch.float64)
    values: Values = {(Signal.VISION_ATTENTION, layer): maps[layer] for layer in range(layers)}
    return Observation.of_equal(2, tokens, {Signal.VISION_ATTENTION: layers}, values), maps


@pytest.mark.parametrize(("blocks", "first"), [(23, 16), (5, 3), (2, 1), (1, 0)])
def test_vtc_cls_adds_up_the_deep_layers_of_any_tower(blocks: int, first: int) -> None:
    seen, maps = attention(blocks)
    scores = VTCCLS().score(seen)
    for image in range(2):
        for token in range(4):
            total = sum(float(maps[layer, image, head, token]) for layer in range(first, blocks) for head in range(3))
            assert float(scores[image, token]) == pytest.approx(total)


def test_layers_and_heads_of_attention_methods_can_be_chosen() -> None:
    seen, maps = attention(4)
    for name in ("vtc-cls", "vispruner", "visionzip"):
        args = {"layers": [1, -1], "head_weights": [[1, 0, 0], [0, 2, -1]]}
        scorer = PruningPolicy(scorer=name, scorer_args=args).build_scorer()
        torch.testing.assert_close(scorer.score(seen), maps[1, :, 0] + 2 * maps[3, :, 1] - maps[3, :, 2])
        assert scorer.needs == {Signal.VISION_ATTENTION: (1, -1)}
        logs = PruningPolicy(scorer=name, scorer_args={**args, "scale": "log"}).build_scorer()
        assert (logs.score(seen) - scorer.score(seen)).abs().max() > 0.1


def test_of_a_hand_computed_row_vispruner_keeps_the_unlike() -> None:
    """Highest score: 0. Left, by score: 1 2 3 4, dealt to (1, 3) and (2, 4); 1 is a copy of 2, 3 of nothing."""
    vectors = torch.tensor([[[9.0, 9], [1, 0], [2, 0], [0, 1], [-1, 0]]])
    scores = torch.tensor([[5.0, 4, 3, 2, 1]])
    visual = torch.ones(1, 5, dtype=torch.bool)
    keep = PruneSimilar(important=0.25).select(scores, visual, torch.tensor([4]), vectors).keep
    assert keep.tolist() == [[True, False, True, True, True]]


def test_vispruner_meets_every_budget_at_every_residue() -> None:
    for tokens in range(2, 40, 3):
        visual, counts = torch.ones(tokens, tokens, dtype=torch.bool), torch.arange(1, tokens + 1)  # a row each budget
        scores, vectors = torch.rand(tokens, tokens), torch.randn(tokens, tokens, 3)
        assert torch.equal(PruneSimilar().select(scores, visual, counts, vectors).keep.sum(1), counts)


def test_of_a_budget_of_one_the_most_attended_token_stays_alone() -> None:
    scores, vectors = torch.tensor([[1.0, 3, 2]]), torch.randn(1, 3, 4)
    visual, one = torch.ones(1, 3, dtype=torch.bool), torch.tensor([1])
    for selector in (PruneSimilar(), ContextMerge(), ContextMerge(context=1.0)):
        assert selector.select(scores, visual, one, vectors).keep.tolist() == [[False, True, False]]
    assert ContextMerge().select(scores, visual, one, vectors).destination.tolist() == [[-1, 1, -1]], (
        "nothing is merged"
    )


def test_of_64_tokens_visionzip_keeps_54_dominant_and_10_context_tokens() -> None:
    scores, visual = torch.arange(576.0)[None], torch.ones(1, 576, dtype=torch.bool)
    vectors = torch.randn(1, 576, 8)
    keep = ContextMerge().select(scores, visual, torch.tensor([64]), vectors).keep
    assert keep[0].nonzero()[:, 0].tolist() == [*range(0, 520, 52), *range(522, 576)]
    carrier = ContextMerge().select(scores, visual, keep.sum(1), vectors).destination
    assert set(carrier.flatten().tolist()) == set(keep[0].nonzero()[:, 0].tolist()), "no token is lost"


def test_a_token_whose_features_are_not_numbers_comes_last() -> None:
    vectors, visual = torch.randn(1, 12, 5), torch.ones(1, 12, dtype=torch.bool)
    vectors[0, 4] = torch.nan
    ranks = SELECTORS["max-min"]().ranks(torch.zeros(1, 12), visual, 12, vectors)
    assert int(ranks[0, 4]) == 11 and sorted(ranks[0].tolist()) == list(range(12))
    broken = torch.ones(1, 12).index_fill(1, torch.tensor([4]), torch.nan)
    keep = SELECTORS["conditional-dpp"]().select(broken, visual, torch.tensor([5]), vectors).keep
    assert keep.sum() == 5 and not keep[0, 4]
    for broken_at in range(12):
        rolled = vectors.roll(broken_at, 1)
        for count in range(1, 12):
            keep = PruneSimilar().select(torch.arange(12.0)[None], visual, torch.tensor([count]), rolled).keep
            assert keep.sum() == count and not keep[0, (4 + broken_at) % 12]
        assert PruneSimilar().select(torch.zeros(1, 12), visual, torch.tensor([12]), rolled).keep.all()
    scores = torch.full((1, 12), torch.nan)
    some = torch.arange(12)[None] % 2 == 1  # the others are line ends, or of another crop
    for name in COMPARED:
        for share, count in ((visual, 9), (some, 5), (some, 6)):
            keep = SELECTORS[name]().select(scores, share, torch.tensor([count]), vectors.roll(1, 1)).keep
            assert keep.sum() == count and not (keep & ~share).any(), name


@pytest.mark.parametrize("name", COMPARED)
def test_what_a_row_keeps_does_not_depend_on_its_batch_even_where_tokens_are_the_same(name: str) -> None:
    selector = SELECTORS[name]()
    for seed in range(20):
        rows = [drawn(seed + n, tokens, tie=name != "conditional-dpp") for n, tokens in enumerate((23, 9, 41))]
        scores, vectors, visual = batch(rows)
        scores, vectors, counts = scores.float(), vectors.float(), torch.tensor([7, 4, 19])
        keep = selector.select(scores, visual, counts, vectors).keep
        own = scores[:1, :23], visual[:1, :23], vectors[:1, :23]
        alone = selector.select(own[0], own[1], counts[:1], own[2]).keep
        assert keep[:1, :23].equal(alone) and keep.sum(1).equal(counts)
        if selector.merges:
            carrier = selector.select(scores, visual, keep.sum(1), vectors).destination
            assert carrier[:1, :23].equal(selector.select(own[0], own[1], alone.sum(1), own[2]).destination)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"scorer": "vispruner", "selector_args": {"important": 1.5}}, "important is 1.5; it is a share"),
        ({"scorer": "visionzip", "selector_args": {"context": -0.1}}, "context is -0.1; it is a share"),
        ({"scorer": "downsample", "selector_args": {"per": "sample"}}, "per is 'sample'"),
        ({"scorer": "vtc-cls", "scorer_args": {"layers": []}}, "layers is empty"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        PruningPolicy(**fields)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", [0.05, 1])
def test_the_shipped_llava_reads_as_many_tokens_as_the_budget_says(
    name: str, keep: int | float, llava: tuple[Any, dict[str, Tensor]]
) -> None:
    model, inputs = llava
    with torch.no_grad(), prune(model, PruningPolicy(scorer=name, keep=keep)) as pruning:
        output = model(**inputs, use_cache=True)
        answers = model.generate(**inputs, max_new_tokens=2)
    count = keep if isinstance(keep, int) else math.ceil(keep * 144)
    assert pruning.keep is not None and pruning.keep.sum(1).tolist() == [count] * 4
    assert output.logits.isfinite().all() and answers.shape[1] > inputs["input_ids"].shape[1]
    real = inputs["attention_mask"].sum(1).max()
    assert cache_of(output).layers[0].keys.shape[2] <= int(real) - 144 + count + 1
    merging = name in ("visionzip", "downsample")
    assert (pruning.destination is not None) is merging
    if merging and count > 1:
        assert pruning.destination is not None and (pruning.destination >= 0).all(), "every token lives on"
