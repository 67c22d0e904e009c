"""Methods that choose before the language model, each against a version with loops written from its definition."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from catp_lightning import PolicyError, PruningError, PruningPolicy, prune
from catp_lightning.data import shipped
from catp_lightning.data.scenes import digit_pool, draw_scene
from catp_lightning.methods.observation import Observation, Signal, Values
from catp_lightning.methods.scorers import SCORERS
from catp_lightning.methods.scorers.vtc_cls import VTCCLS
from catp_lightning.methods.selection import choose_tokens
from catp_lightning.methods.selectors import SELECTORS
from catp_lightning.methods.selectors.context_merge import ContextMerge
from catp_lightning.methods.selectors.pool import Pool, grid
from catp_lightning.methods.selectors.prune_similar import PruneSimilar
from tests.support.families import BY_NAME

NAMES = ("vtc-cls", "vispruner", "visionzip", "divprune", "cdpruner", "downsample")
COMPARED = ("prune-similar", "context-merge", "max-min", "conditional-dpp")


def cosine(a: list[float], b: list[float]) -> float:
    """To five decimals: what is equal but for rounding is a tie."""
    if a == b:
        return 1.0
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return round(sum(x * y for x, y in zip(a, b, strict=True)) / lengths, 5) if lengths else 0.0


def by_score(scores: list[float]) -> list[int]:
    """Highest first; of equals the lowest index, what is not a number last."""
    return sorted(range(len(scores)), key=lambda t: (math.isnan(scores[t]), -scores[t], t))


def slow_prune_similar(scores: list[float], features: list[list[float]], count: int, share: float) -> set[int]:
    order = by_score(scores)
    top = math.floor(count * share)
    if share > 0 and top == 0:
        top = 1
    left = order[top:]
    if top == count:
        left = []
    while top + len(left) > count:
        first: list[int] = []
        second: list[int] = []
        for number, token in enumerate(left):
            (second if number % 2 else first).append(token)
        drop = min(8, top + len(left) - count, len(left) // 2)
        nearest = {a: max(cosine(features[a], features[b]) for b in second) for a in first}
        least_similar_first = sorted(first, key=lambda a: (nearest[a], first.index(a)))
        left = least_similar_first[: len(first) - drop][::-1] + second
    return set(order[:top] + left)


def slow_context_merge(scores: list[float], keys: list[list[float]], count: int, share: float) -> dict[int, int]:
    """Who carries each token."""
    context = min(count - 1, math.floor(count * share + 0.5))
    dominant = by_score(scores)[: count - context]
    rest = [t for t in range(len(scores)) if t not in dominant]
    carrier = {t: t for t in dominant}
    if context == 0:
        return carrier | dict.fromkeys(rest, -1)
    step = max(1, len(rest) // context)
    targets = [rest[number * step] for number in range(context)]
    for token in rest:
        best = targets[0]
        for target in targets:
            if cosine(keys[token], keys[target]) > cosine(keys[token], keys[best]):
                best = target
        carrier[token] = token if token in targets else best
    return carrier


def slow_max_min(features: list[list[float]], count: int) -> list[int]:
    apart = [[1 - cosine(a, b) for b in features] for a in features]
    tokens = range(len(features))
    chosen: list[int] = []
    while len(chosen) < count:
        best, farthest = -1, -1.0
        for token in tokens:
            others = [apart[token][u] for u in (chosen or tokens) if u != token]
            if token not in chosen and (min(others) if others else math.inf) > farthest:
                best, farthest = token, min(others) if others else math.inf
        chosen.append(best)
    return chosen


def slow_conditional_dpp(relevance: list[float], features: list[list[float]], count: int) -> list[int]:
    """Adds the token with which the determinant of the chosen block is largest."""
    size = len(relevance)
    unit = np.array(features) / np.linalg.norm(features, axis=1, keepdims=True)
    kernel = np.outer(relevance, relevance) * (unit @ unit.T)
    kernel += 1e-4 * np.eye(size)
    chosen: list[int] = []
    for _ in range(count):
        best, largest = -1, -math.inf
        for token in range(size):
            block = kernel[np.ix_([*chosen, token], [*chosen, token])]
            if token not in chosen and np.linalg.det(block) > largest:
                best, largest = token, float(np.linalg.det(block))
        chosen.append(best)
    return chosen


def drawn(seed: int, tokens: int, tie: bool) -> tuple[list[float], list[list[float]]]:
    """Scores and vectors; with ties scores are few numbers and some vectors are the same."""
    rng = np.random.default_rng(seed)
    if not tie:
        return rng.normal(size=tokens).tolist(), rng.normal(size=(tokens, 5)).tolist()
    vectors = rng.normal(size=(max(2, tokens // 2), 5))[rng.integers(0, max(2, tokens // 2), tokens)]
    return rng.integers(0, 3, tokens).astype(float).tolist(), vectors.tolist()


def batch(rows: list[tuple[list[float], list[list[float]]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Of different lengths; what is beyond a row's own looks better than anything in it."""
    size = max(len(scores) for scores, _ in rows)
    scores = torch.full((len(rows), size), 99.0, dtype=torch.float64)
    vectors, visual = torch.full((len(rows), size, 5), 7.0, dtype=torch.float64), torch.zeros(len(rows), size) > 0
    for row, (own, features) in enumerate(rows):
        scores[row, : len(own)], visual[row, : len(own)] = torch.tensor(own, dtype=torch.float64), True
        vectors[row, : len(own)] = torch.tensor(features, dtype=torch.float64)
    return scores, vectors, visual


SIZES = st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 1.0)), min_size=1, max_size=4)


@given(SIZES, st.integers(0, 1000), st.booleans(), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_vispruner_drops_of_pairs_the_one_most_similar_to_its_counterpart(
    sizes: list[tuple[int, float]], seed: int, tie: bool, share: float
) -> None:
    rows = [drawn(seed + n, tokens, tie) for n, (tokens, _) in enumerate(sizes)]
    counts = [math.ceil(keep * tokens) for tokens, keep in sizes]
    scores, vectors, visual = batch(rows)
    keep = PruneSimilar(important=share).select(scores, visual, torch.tensor(counts), vectors)
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
    keep = selector.select(scores, visual, torch.tensor(counts), vectors)
    carrier = selector.carriers(keep, scores, visual, vectors)
    for row, (own, keys) in enumerate(rows):
        expected = slow_context_merge(own, keys, counts[row], share)
        assert carrier[row].tolist() == [expected.get(t, -1) for t in range(carrier.shape[1])]
        assert keep[row].tolist() == [expected.get(t, -1) == t for t in range(carrier.shape[1])]
        assert keep[row].sum() == counts[row]


@given(SIZES, st.integers(0, 1000), st.booleans())
def test_divprune_adds_the_token_farthest_from_its_nearest(
    sizes: list[tuple[int, float]], seed: int, tie: bool
) -> None:
    rows = [drawn(seed + n, tokens, tie) for n, (tokens, _) in enumerate(sizes)]
    counts = [math.ceil(keep * tokens) for tokens, keep in sizes]
    scores, vectors, visual = batch(rows)
    ranks = SELECTORS["max-min"]().ranks(scores, visual, max(counts), vectors)
    keep = SELECTORS["max-min"]().select(scores, visual, torch.tensor(counts), vectors)
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
    keep = PruneSimilar(important=0.25).select(scores, visual, torch.tensor([4]), vectors)
    assert keep.tolist() == [[True, False, True, True, True]]


@pytest.mark.parametrize("tokens", range(2, 40))
def test_vispruner_meets_every_budget_at_every_residue(tokens: int) -> None:
    visual = torch.ones(1, tokens, dtype=torch.bool)
    for count in range(1, tokens + 1):
        keep = PruneSimilar().select(torch.rand(1, tokens), visual, torch.tensor([count]), torch.randn(1, tokens, 3))
        assert keep.sum() == count


def test_of_a_budget_of_one_the_most_attended_token_stays_alone() -> None:
    scores, vectors = torch.tensor([[1.0, 3, 2]]), torch.randn(1, 3, 4)
    visual, one = torch.ones(1, 3, dtype=torch.bool), torch.tensor([1])
    for selector in (PruneSimilar(), ContextMerge(), ContextMerge(context=1.0)):
        assert selector.select(scores, visual, one, vectors).tolist() == [[False, True, False]]
    keep = ContextMerge().select(scores, visual, one, vectors)
    assert ContextMerge().carriers(keep, scores, visual, vectors).tolist() == [[-1, 1, -1]], "nothing is merged into it"


def test_of_64_tokens_visionzip_keeps_54_dominant_and_10_context_tokens() -> None:
    scores, visual = torch.arange(576.0)[None], torch.ones(1, 576, dtype=torch.bool)
    vectors = torch.randn(1, 576, 8)
    keep = ContextMerge().select(scores, visual, torch.tensor([64]), vectors)
    assert keep[0].nonzero()[:, 0].tolist() == [*range(0, 520, 52), *range(522, 576)]
    carrier = ContextMerge().carriers(keep, scores, visual, vectors)
    assert set(carrier.flatten().tolist()) == set(keep[0].nonzero()[:, 0].tolist()), "no token is lost"


def test_a_token_whose_features_are_not_numbers_comes_last() -> None:
    vectors, visual = torch.randn(1, 12, 5), torch.ones(1, 12, dtype=torch.bool)
    vectors[0, 4] = torch.nan
    ranks = SELECTORS["max-min"]().ranks(torch.zeros(1, 12), visual, 12, vectors)
    assert int(ranks[0, 4]) == 11 and sorted(ranks[0].tolist()) == list(range(12))
    broken = torch.ones(1, 12).index_fill(1, torch.tensor([4]), torch.nan)
    keep = SELECTORS["conditional-dpp"]().select(broken, visual, torch.tensor([5]), vectors)
    assert keep.sum() == 5 and not keep[0, 4]
    for broken_at in range(12):
        rolled = vectors.roll(broken_at, 1)
        for count in range(1, 12):
            keep = PruneSimilar().select(torch.arange(12.0)[None], visual, torch.tensor([count]), rolled)
            assert keep.sum() == count and not keep[0, (4 + broken_at) % 12]
        assert PruneSimilar().select(torch.zeros(1, 12), visual, torch.tensor([12]), rolled).all()
    scores = torch.full((1, 12), torch.nan)
    some = torch.arange(12)[None] % 2 == 1  # the others are line ends, or of another crop
    for name in COMPARED:
        for share, count in ((visual, 9), (some, 5), (some, 6)):
            keep = SELECTORS[name]().select(scores, share, torch.tensor([count]), vectors.roll(1, 1))
            assert keep.sum() == count and not (keep & ~share).any(), name


@pytest.mark.parametrize("name", COMPARED)
def test_what_a_row_keeps_does_not_depend_on_its_batch_even_where_tokens_are_the_same(name: str) -> None:
    selector = SELECTORS[name]()
    for seed in range(20):
        rows = [drawn(seed + n, tokens, tie=name != "conditional-dpp") for n, tokens in enumerate((23, 9, 41))]
        scores, vectors, visual = batch(rows)
        scores, vectors, counts = scores.float(), vectors.float(), torch.tensor([7, 4, 19])
        keep = selector.select(scores, visual, counts, vectors)
        own = scores[:1, :23], visual[:1, :23], vectors[:1, :23]
        alone = selector.select(own[0], own[1], counts[:1], own[2])
        assert keep[:1, :23].equal(alone) and keep.sum(1).equal(counts)
        if selector.merges:
            carrier = selector.carriers(keep, scores, visual, vectors)
            assert carrier[:1, :23].equal(selector.carriers(alone, *own))


def test_equal_tokens_are_kept_from_the_first_on() -> None:
    vectors, visual, counts = torch.ones(1, 9, 4) * 0.3, torch.ones(1, 9, dtype=torch.bool), torch.tensor([3])
    for name in ("max-min", "conditional-dpp"):
        assert SELECTORS[name]().select(torch.ones(1, 9), visual, counts, vectors)[0, :3].all()


def slow_pool(side: int, count: int) -> list[int]:
    """Who carries each token of a square image."""
    shapes = [(h, w) for h in range(1, side + 1) for w in range(h, side + 1) if h * w <= count]
    most = max(h * w for h, w in shapes)
    high, wide = min((s for s in shapes if s[0] * s[1] == most), key=lambda s: s[1] - s[0])
    cells: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for line in range(side):
        for column in range(side):
            cell = (math.floor(line * high / side), math.floor(column * wide / side))
            cells.setdefault(cell, []).append((line, column))
    assert len(cells) == most
    carrier = [-1] * side**2
    for tokens in cells.values():
        middle = [sum(place[axis] for place in tokens) / len(tokens) for axis in (0, 1)]
        best = min(tokens, key=lambda t: ((t[0] - middle[0]) ** 2 + (t[1] - middle[1]) ** 2, t))
        for line, column in tokens:
            carrier[line * side + column] = best[0] * side + best[1]
    return carrier


def square(sides: list[int], **more: Any) -> Observation:
    valid = torch.arange(max(sides) ** 2) < torch.tensor([side**2 for side in sides])[:, None]
    return Observation(valid, {Signal.VISION_ATTENTION: 2}, {}, **more)


@pytest.mark.parametrize("side", [1, 2, 3, 5, 6, 12])
def test_downsampling_is_the_mean_over_cells_of_a_coarser_grid(side: int) -> None:
    seen, scores = square([side, 12]), torch.zeros(2, 144)
    for count in range(1, side**2 + 1):
        choice = choose_tokens(scores, Pool(), count, seen, seen.valid)
        expected = slow_pool(side, count)
        assert choice.carrier is not None and choice.carrier[0, : side**2].tolist() == expected
        assert choice.keep[0, : side**2].tolist() == [carrier == t for t, carrier in enumerate(expected)]
        assert not choice.keep[0, side**2 :].any() and choice.carrier[0, side**2 :].eq(-1).all()


def test_grids_of_hand_computed_budgets() -> None:
    assert [grid(12, count) for count in (1, 7, 8, 13, 18, 36, 72)] == [
        *((1, 1), (1, 7), (2, 4), (3, 4), (3, 6), (6, 6), (8, 9))
    ]


@pytest.mark.parametrize(
    ("seen", "says"),
    [
        (Observation.of_equal(1, 6, {}, {}), "an image has 6 of them, which is no square number"),
        (square([3], crops=torch.zeros(1, 9, dtype=torch.long)), "several crops"),
        (square([3], protected=torch.arange(9)[None] == 8), "line ends"),
    ],
)
def test_what_is_no_square_grid_is_not_pooled(seen: Observation, says: str) -> None:
    with pytest.raises(PruningError, match=says):
        Pool().vectors(seen)


@pytest.mark.parametrize("name", ["Blip2-OPT", "Qwen2-VL", "Gemma3"])
def test_a_family_that_does_not_show_its_patches_is_not_downsampled(name: str) -> None:
    with (
        pytest.raises(PruningError, match="averages tokens over a square grid"),
        prune(BY_NAME[name].model(), PruningPolicy(scorer="downsample")),
    ):
        pass


def test_crops_and_line_ends_of_llava_next_are_refused_by_downsampling() -> None:
    row = BY_NAME["LlavaNext"]
    says = pytest.raises(PruningError, match="square grid, and those of LlavaNextForConditionalGeneration are none")
    with says, prune(row.model(), PruningPolicy(scorer="downsample")):
        pass


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


@pytest.fixture(scope="module")
def llava() -> tuple[Any, dict[str, Tensor]]:
    folder = shipped("digits_llava")
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    rng, pool = np.random.default_rng(3), digit_pool("test")
    images = [[np.stack([draw_scene(rng, pool, 6, 6).image] * 3, -1)] for _ in range(4)]
    texts = [
        f"<image> Question: {words} Short answer:" for words in ("Is there a 3?", "How many digits are there?") * 2
    ]
    return model.eval(), processor(images=images, text=texts, padding=True, return_tensors="pt")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", [0.5, 0.05, 1, 18])
def test_the_shipped_llava_reads_as_many_tokens_as_the_budget_says(
    name: str, keep: int | float, llava: tuple[Any, dict[str, Tensor]]
) -> None:
    model, inputs = llava
    with torch.no_grad(), prune(model, PruningPolicy(scorer=name, keep=keep)) as pruning:
        output = model(**inputs, use_cache=True)
        answers = model.generate(**inputs, max_new_tokens=3)
    count = keep if isinstance(keep, int) else math.ceil(keep * 144)
    assert pruning.keep is not None and pruning.keep.sum(1).tolist() == [count] * 4
    assert output.logits.isfinite().all() and answers.shape[1] > inputs["input_ids"].shape[1]
    real = inputs["attention_mask"].sum(1).max()
    assert output.past_key_values.layers[0].keys.shape[2] <= int(real) - 144 + count + 1
    merging = name in ("visionzip", "downsample")
    assert (pruning.carrier is not None) is merging
    if merging and count > 1:
        assert pruning.carrier is not None and (pruning.carrier >= 0).all(), "every token lives on"


def test_downsampling_the_shipped_llava_is_reading_means_in_the_place_of_cells(
    llava: tuple[Any, dict[str, Tensor]],
) -> None:
    model, inputs = llava
    rows: list[Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["inputs_embeds"].clone()), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    visual = inputs["input_ids"] == model.config.image_token_id
    features = rows[0][visual].view(4, 12, 12, -1)
    carriers = torch.tensor(slow_pool(12, 36))
    written, mask = rows[0].clone(), inputs["attention_mask"].clone()
    flat = features.flatten(1, 2).clone()
    flat[:, carriers.unique()] = features.unfold(1, 2, 2).unfold(2, 2, 2).mean((-1, -2)).flatten(1, 2)
    written[visual] = flat.flatten(0, 1)
    mask[visual] = (carriers == torch.arange(144)).long().repeat(4)
    with torch.no_grad():
        positions = torch.arange(mask.shape[1]).expand(mask.shape)
        full = model(inputs_embeds=written, attention_mask=mask, position_ids=positions).logits[:, -1]
        with prune(model, PruningPolicy(scorer="downsample", keep=36)):
            pruned = model(**inputs).logits[:, -1]
    torch.testing.assert_close(pruned, full, rtol=0, atol=2e-5 * float(full.abs().max()))
