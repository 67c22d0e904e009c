"""SparseVLM, DART and visual exit against slow versions of their definitions, written with loops and plain numbers."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from catp_lightning import PolicyError, PruningError, PruningPolicy, TokenPruning, prune
from catp_lightning.methods.budget import keep_count
from catp_lightning.methods.observation import Observation, Signal
from catp_lightning.methods.scorers.dart import DART as DartScorer
from catp_lightning.methods.scorers.sparsevlm import SparseVLM, raters
from catp_lightning.methods.scorers.visual_exit import VisualExit
from catp_lightning.methods.selectors.dart import DART
from catp_lightning.methods.selectors.recycle import Recycle, split
from tests.support.families import BY_NAME, Row
from tests.support.matrix import BEAMS, exact, generate, scale
from tests.support.models import random_blip2
from tests.support.modules import Answering, Generating
from tests.support.oracles import IMAGE
from tests.support.stages import LLAMA, OPT, QWEN, chosen, masked, model_of
from tests.support.trainers import loading, trainer

pytestmark = pytest.mark.usefixtures("no_grad")
Rows = list[list[float]]
every_model = pytest.mark.parametrize("row", [LLAMA, QWEN, OPT], ids=repr)
seeds = given(st.integers(0, 10**6))


def numbers(shape: tuple[int, ...], seed: int, most: int = 3) -> Tensor:
    """Small whole numbers, so that there are ties: float64."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).double()


def some(rows: int, tokens: int, seed: int) -> Tensor:
    """Which tokens each row has: bool [rows, tokens], scattered, at least one."""
    valid = torch.rand(rows, tokens, generator=torch.Generator().manual_seed(seed)) < 0.8
    valid[:, 0] |= ~valid.any(1)
    return valid


def best_first(scores: list[float], places: list[int]) -> list[int]:
    return sorted(places, key=lambda place: (math.isnan(scores[place]), -scores[place], place))


# --- SparseVLM


def attended(seed: int, layers: int = 1) -> Observation:
    """Three samples of up to seven tokens and up to five text rows, in two heads; some text rows are alike."""
    valid, text = some(3, 7, seed), some(3, 5, seed + 1).sort(1, descending=True)[0]
    values: dict[Any, Tensor] = {
        Signal.IMAGE_EMBEDS: numbers((3, 7, 4), seed + 2),
        Signal.TEXT_EMBEDS: numbers((3, 5, 4), seed + 3, 1),
    }
    here = torch.ones(3, 7, dtype=torch.bool)
    here[1, 5:] = False  # the second sample has fewer
    valid &= here
    values[Signal.IMAGE_EMBEDS] = values[Signal.IMAGE_EMBEDS] * here[..., None]
    values[Signal.TEXT_EMBEDS] = values[Signal.TEXT_EMBEDS] * text[..., None]
    for layer in range(layers):
        paid = numbers((3, 2, 5, 7), seed + 4 + layer).abs() / 8
        values[Signal.TEXT_TO_IMAGE_ATTENTION, layer] = (paid * text[:, None, :, None] * here[:, None, None]).float()
    return Observation(valid, {Signal.TEXT_TO_IMAGE_ATTENTION: layers}, values, text=text)


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
    exact(SparseVLM().score(seen), torch.tensor([[0.25, 0.25]]), atol=1e-7)


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


# --- recycling


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
    keep = Recycle().select(scores, there, counts, vectors)
    carrier = Recycle().carriers(keep, scores, there, vectors)
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
    keep = Recycle().select(scores, there, torch.tensor([4]), vectors)
    assert keep[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3]
    assert Recycle().carriers(keep, scores, there, vectors)[0].tolist() == [0, 1, 2, 3, 3, 3, *[-1] * 6]


@pytest.mark.parametrize("selector", [Recycle(), DART()], ids=["recycle", "dart"])
def test_rows_that_are_nan_or_all_alike_are_chosen_from_all_the_same(selector: Any) -> None:
    scores, there = torch.zeros(2, 40), torch.ones(2, 40, dtype=torch.bool)
    vectors = torch.ones(2, 40, 3)
    vectors[1, 7:12] = math.nan
    keep = selector.select(scores, there, torch.tensor([5, 5]), vectors)
    assert keep.sum(1).tolist() == [5, 5] and keep[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4]
    if selector.merges:
        carrier = selector.carriers(keep, scores, there, vectors)
        assert all(keep[row, own] for row in (0, 1) for own in carrier[row].tolist() if own >= 0)


# --- DART


def dart_by_hand(scores: list[float], there: list[int], budget: int, vectors: Rows, pivots: int) -> list[bool]:
    """Each pivot in turn takes the tokens least like it."""
    first = best_first(scores, there)[: min(pivots, budget)]
    kept = list(first)
    for turn, pivot in enumerate(first):
        rest = budget - len(first)
        takes = rest // len(first) + (turn < rest % len(first))
        likeness = {}
        for token in there:
            ours, theirs = vectors[pivot], vectors[token]
            product = sum(a * b for a, b in zip(ours, theirs, strict=True))
            norms = math.sqrt(sum(a * a for a in ours) * sum(b * b for b in theirs))
            likeness[token] = round(product / norms, 9) if norms else 0.0
        others = sorted((token for token in there if token not in kept), key=lambda token: (likeness[token], token))
        kept += others[:takes]
    return [place in kept for place in range(len(scores))]


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 5))
def test_dart_keeps_what_is_least_like_each_pivot_in_turn(seed: int, tokens: int, pivots: int) -> None:
    vectors, there = numbers((3, tokens, 3), seed, 1), some(3, tokens, seed)
    vectors = vectors * torch.tensor([1.0, 2.0, 4.0])[:, None, None]  # scaling by these is exact
    scores = DartScorer().score(Observation(there, {}, {Signal.HIDDEN_STATES: vectors}))
    assert torch.equal(scores, vectors.abs().sum(-1))
    own = there.sum(1)
    counts = (own * torch.tensor([seed % 5 + 1, 3, 1]) / 5).ceil().long().minimum(own)
    selector = DART(pivots=pivots)
    keep = selector.select(
        scores, there, counts, selector.vectors(Observation(there, {}, {Signal.HIDDEN_STATES: vectors}))
    )
    for row in range(3):
        places = there[row].nonzero()[:, 0].tolist()
        expected = dart_by_hand(scores[row].tolist(), places, int(counts[row]), vectors[row].tolist(), pivots)
        assert keep[row].tolist() == expected


@pytest.mark.parametrize(
    ("budget", "stay"),
    [(1, [0]), (2, [0, 1]), (3, [0, 1, 3]), (4, [0, 1, 3, 4]), (5, [0, 1, 2, 3, 4]), (6, [0, 1, 2, 3, 4, 5])],
)
def test_two_pivots_by_hand(budget: int, stay: list[int]) -> None:
    """The first takes what points away from it, (-1, 0), then (0, -1); the second what is least like (0, 9)."""
    vectors = torch.tensor([[[10.0, 0.0], [0.0, 9.0], [1.0, 0.0], [-1.0, 0.0], [0.0, -1.0], [1.0, 1.0]]])
    there = torch.ones(1, 6, dtype=torch.bool)
    keep = DART(pivots=2).select(vectors.abs().sum(-1), there, torch.tensor([budget]), vectors)
    assert keep[0].nonzero()[:, 0].tolist() == stay


def test_dart_compares_rows_of_half_precision_in_float32() -> None:
    hidden = torch.full((1, 1, 300), 1.0, dtype=torch.bfloat16)
    seen = Observation(torch.ones(1, 1, dtype=torch.bool), {}, {Signal.HIDDEN_STATES: hidden})
    assert DartScorer().score(seen).item() == 300 and DART().vectors(seen).dtype == torch.float32
    assert Recycle().vectors(seen).dtype == torch.float32


# --- in models


@pytest.mark.parametrize("row", [LLAMA, QWEN], ids=repr)
def test_sparsevlm_ends_at_the_budget_with_recycled_tokens_in_it(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    with prune(model, PruningPolicy(scorer="sparsevlm", keep=0.3)) as pruning:
        cache = model(**inputs, use_cache=True).past_key_values
    counts = row.oracle.tokens(inputs).sum(1)
    assert pruning.keep is not None and pruning.carrier is not None
    assert pruning.keep.sum(1).tolist() == [keep_count(0.3, count) for count in counts.tolist()]
    itself = torch.arange(pruning.keep.shape[1])
    assert torch.equal(pruning.carrier == itself, pruning.keep), "those that stay carry themselves"
    assert (pruning.carrier >= 0).sum() > pruning.keep.sum(), "and some carry others"
    lengths = [cache.get_seq_length(layer) for layer in range(4)]
    assert lengths[0] > lengths[1] > lengths[2] == lengths[3]  # stages 1 and 2


def test_a_choice_follows_a_calibrated_policys_heads() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    kept = []
    for weights in ([[1.0, 0, 0, 0]], [[-1.0, 0, 0, 0]]):
        args = {"head_weights": weights, "stages_at": [2]}
        with prune(model, PruningPolicy(scorer="sparsevlm", scorer_args=args, selector="top-k", keep=2)) as pruning:
            model(**inputs)
        kept.append(pruning.keep)
    assert not (kept[0] & kept[1]).any()


@pytest.mark.parametrize(
    ("scorer", "args", "says"),
    [
        ("sparsevlm", {"schedule": "half"}, "schedule of scorer 'sparsevlm' is 'half'; allowed is 'budget' or 'rank'"),
        ("sparsevlm", {"scale": 0.0}, "scale is 0.0.*above 0"),
        ("dart", {"layer": 0}, "layer is 0.*at least 1"),
        ("visual-exit", {"layer": 0}, "layer is 0.*at least 1, or None"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(scorer: str, args: dict[str, Any], says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        PruningPolicy(scorer=scorer, scorer_args=args)


def test_dart_without_pivots_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"pivots is 0.*at least 1"):
        PruningPolicy(scorer="dart", selector_args={"pivots": 0})


@pytest.mark.parametrize("scorer", ["sparsevlm", "dart", "visual-exit"])
@pytest.mark.parametrize("name", ["Mllama", "Blip2-T5"])
def test_models_whose_decoder_reads_no_visual_tokens_are_refused(scorer: str, name: str) -> None:
    model = BY_NAME[name].model()
    with (
        pytest.raises(PruningError, match=r"reads them by (cross-attention|encoder).*docs/methods.md"),
        prune(model, PruningPolicy(scorer=scorer)),
    ):
        pass


# --- visual exit


EXIT = PruningPolicy(scorer="visual-exit", keep=0.3)


def test_half_of_any_depth_is_where_tokens_exit() -> None:
    assert [VisualExit().stages(depth) for depth in (2, 3, 4, 32)] == [(1,), (1,), (2,), (16,)]
    assert VisualExit(layer=5).stages(32) == (5,)


@every_model
@pytest.mark.parametrize("layer", [None, 1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_visual_exit_equals_hiding_all_visual_tokens_from_a_layer_on(
    row: Row, layer: int | None, attention: str
) -> None:
    dtype = torch.float64 if attention == "sdpa" else torch.float32
    model, inputs = model_of(row, dtype, attention), row.inputs(dtype=dtype)
    policy = PruningPolicy(scorer="visual-exit", scorer_args={"layer": layer}, keep=7)
    nothing = [torch.zeros_like(chosen(inputs, row, (1,))[0])]
    full = model(**inputs).logits
    with prune(model, policy) as pruning:
        prefill = model(**inputs).logits
        tokens, steps = generate(row, model, inputs)
    with masked(row, model, inputs, (layer or 2,), nothing):
        oracle = model(**inputs).logits
        oracle_tokens, oracle_steps = generate(row, model, inputs)
    rows, atol = row.oracle.compared(inputs, nothing[0]), row.tolerance(dtype, attention) * scale(full)
    assert scale(oracle[rows] - full[rows]) > 0.05 * scale(full), "exiting must move logits, or this proves nothing"
    exact(prefill[rows], oracle[rows], atol=atol)
    exact(steps, oracle_steps, atol=atol)
    assert torch.equal(tokens, oracle_tokens)
    there = row.oracle.tokens(inputs)
    assert pruning.keep is not None and pruning.scores is not None
    assert pruning.keep.shape == there.shape and not pruning.keep.any()
    assert torch.equal(pruning.scores == 0, there), "and -inf where a sample has no token"
    assert [(keep.any().item(), counts.tolist()) for keep, counts in pruning.choices] == [
        (False, there.sum(1).tolist())
    ] * 2


@every_model
def test_after_exit_beams_and_uncached_steps_find_the_same(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    nothing = [torch.zeros_like(chosen(inputs, row, (1,))[0])]
    with prune(model, EXIT):
        beams, beam_steps = generate(row, model, inputs, **BEAMS)
        cached, steps = generate(row, model, inputs)
        uncached, again = generate(row, model, inputs, use_cache=False)
    with masked(row, model, inputs, (2,), nothing):
        oracle, oracle_steps = generate(row, model, inputs, **BEAMS)
    assert torch.equal(beams, oracle) and torch.equal(cached, uncached)
    exact(beam_steps, oracle_steps, atol=1e-10 * scale(beam_steps))
    exact(again, steps, atol=1e-10 * scale(steps))


@every_model
def test_the_loss_after_exit_leaves_out_labels_predicted_from_images(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    labels, nothing = row.oracle.labels(inputs), [torch.zeros_like(chosen(inputs, row, (1,))[0])]
    with prune(model, EXIT) as pruning:
        loss = model(**inputs, labels=labels).loss
    left_out = row.oracle.left_out(inputs, labels, nothing[0])
    assert pruning.labels_left_out == left_out.sum() > 0
    with masked(row, model, inputs, (2,), nothing):
        expected = model(**inputs, labels=labels.masked_fill(left_out, -100)).loss
    exact(loss, expected, atol=1e-10 * expected.item())


@every_model
def test_a_sample_does_not_depend_on_its_batch_after_exit(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    with prune(model, EXIT):
        _, together = generate(row, model, inputs)
        for sample in range(len(together)):
            _, steps = generate(row, model, row.inputs([sample], pads=3))
            exact(steps, together[[sample]], atol=1e-10 * scale(together))


def test_text_alone_and_everything_kept_run_unpruned() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    text = {"input_ids": torch.arange(10, 30).view(2, 10)}
    full, plain = model(**inputs).logits, model(**text).logits
    with prune(model, EXIT):
        assert torch.equal(model(**text).logits, plain)
    with prune(model, PruningPolicy(scorer="visual-exit", keep=1.0)):
        assert torch.equal(model(**inputs).logits, full)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_sample_of_nothing_but_an_image_is_refused_with_what_to_do(beams: int) -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs([0, 0])
    ids = torch.tensor([[5, 8, 13, *[IMAGE] * 9, 6], [0, 0, 0, 0, *[IMAGE] * 9]])
    inputs = {**inputs, "input_ids": ids, "attention_mask": (ids != 0).long()}
    with prune(model, EXIT):
        with pytest.raises(PruningError, match=r"prompt of sample 1 ends in an image.*Put text after the image"):
            generate(LLAMA, model, inputs, num_beams=beams)
        with pytest.raises(
            PruningError, match=r"tokens of sample 1 are visual and all of them leave.*prompt with text"
        ):
            model(**inputs)
        model(**LLAMA.inputs([0]))  # the next call is pruned like any other


def test_the_callback_reports_that_nothing_is_kept() -> None:
    callback, (model, inputs) = TokenPruning(EXIT, compare=True), random_blip2()
    settings = {"max_new_tokens": 3, "do_sample": False}
    for run, module in (("validate", Answering((model, inputs))), ("predict", Generating(model, settings))):
        getattr(trainer(callback), run)(module, loading([inputs]))
        assert callback.figures["catp/tokens_kept"] == callback.figures["catp/keep_share"] == 0
        assert 0 <= callback.figures["catp/agreement"] <= 1
