"""Every scorer against a slow, loop-written version of its definition."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from catp_lightning import PolicyError, PruningPolicy
from catp_lightning.methods.observation import Observation, Signal, join
from catp_lightning.methods.scorers import SCORERS
from catp_lightning.methods.scorers.catp import CATP, borda_points, borda_vote
from catp_lightning.methods.scorers.controls import Random, Stride
from catp_lightning.methods.scorers.cross_attention import CrossAttention
from catp_lightning.methods.scorers.region_attention import RegionAttention
from catp_lightning.methods.scorers.self_attention import SelfAttention
from catp_lightning.methods.selectors.dpp import DPP
from catp_lightning.utils.hashing import fingerprint, mix, uniform


def seen(
    images: int = 2, layers: int = 3, heads: int = 2, tokens: int = 5, patches: int = 7, seed: int = 0
) -> Observation:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    values: dict[Signal | tuple[Signal, int], Tensor] = {
        Signal.VISION_ATTENTION_RECEIVED: draw(images, patches),
        Signal.IMAGE_FEATURES: draw(images, tokens, 4) - 0.5,
        Signal.IMAGE_HASH: torch.arange(images),
    }
    for layer in range(layers):
        maps = draw(images, heads, tokens, patches)
        values[Signal.CROSS_ATTENTION, layer] = maps / maps.sum(-1, keepdim=True)
        values[Signal.SELF_ATTENTION, layer] = draw(images, heads, tokens)
    return Observation.of_equal(images, tokens, {Signal.CROSS_ATTENTION: layers, Signal.SELF_ATTENTION: layers}, values)


@pytest.mark.parametrize("queries", [2, 256, 257, 300])
def test_points_are_right_whatever_number_of_queries_there_is(queries: int) -> None:
    attention = torch.rand(2, queries, 3)
    beaten = attention[:, :, None] > attention[:, None]  # without ties
    assert torch.equal(borda_points(attention), beaten.sum(2).float()) and beaten.any()


def slow_borda(attention: Tensor, head_weights: Tensor, image_weights: Tensor) -> Tensor:
    """A vote by every (layer, head, image token): sort the queries, last place gets 0 points, first Q - 1."""
    images, layers, heads, queries, patches = attention.shape
    scores = torch.zeros(images, queries, dtype=torch.float64)
    for image in range(images):
        for layer in range(layers):
            for head in range(heads):
                for patch in range(patches):
                    row = [float(attention[image, layer, head, q, patch]) for q in range(queries)]
                    worst_first = sorted(range(queries), key=lambda q: (row[q], -q))
                    for points, query in enumerate(worst_first):
                        scores[image, query] += points * head_weights[layer, head] * image_weights[image, patch]
    return scores


@pytest.mark.parametrize("weighted", [False, True])
def test_the_borda_vote_is_its_definition(weighted: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    attention = torch.rand(2, 3, 2, 6, 7, generator=generator, dtype=torch.float64)
    heads = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    patches = torch.rand(2, 7, generator=generator, dtype=torch.float64)
    if weighted:
        torch.testing.assert_close(borda_vote(attention, heads, patches), slow_borda(attention, heads, patches))
    else:
        expected = slow_borda(attention, torch.ones(3, 2), torch.ones(2, 7))
        assert torch.equal(borda_vote(attention), expected)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=12))
def test_points_are_a_permutation_whatever_the_ties_and_the_lowest_index_wins(row: list[int]) -> None:
    points = borda_points(torch.tensor(row, dtype=torch.float32)[:, None])[:, 0]
    assert sorted(points.tolist()) == list(range(len(row)))
    for a in range(len(row)):
        for b in range(a):
            if row[a] == row[b]:
                assert points[b] > points[a]


def test_a_weight_on_probabilities_before_ranking_would_change_nothing_and_ours_does() -> None:
    attention, weights = torch.rand(1, 1, 1, 5, 7), torch.rand(1, 7)
    assert torch.equal(borda_vote(attention * weights[:, None, None, None]), borda_vote(attention))
    assert not torch.equal(borda_vote(attention, image_weights=weights).argsort(1), borda_vote(attention).argsort(1))


def test_layers_and_head_weights_choose_what_is_summed() -> None:
    observation = seen()
    everybody = CATP().score(observation)
    each = [CATP(layers=(layer,)).score(observation) for layer in range(3)]
    torch.testing.assert_close(sum(each), everybody)
    assert torch.equal(CATP(layers=(-1,)).score(observation), each[2])
    only = CATP(head_weights=((0.0, 0.0), (0.0, -2.0), (0.0, 0.0))).score(observation)
    alone = observation.values[Signal.CROSS_ATTENTION, 1][:, None, 1:]
    torch.testing.assert_close(only, -2 * borda_vote(alone))
    weighted = CATP(image_weight="received").score(observation)
    attention = observation.by_layer(Signal.CROSS_ATTENTION)
    torch.testing.assert_close(
        weighted, borda_vote(attention, image_weights=observation[Signal.VISION_ATTENTION_RECEIVED])
    )


def test_head_weights_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 2\); the scores come from 3 layers of 2 heads"):
        CATP(head_weights=((1.0, 1.0),)).score(seen())
    with pytest.raises(ValueError, match="2 rows for 1 layers"):
        CATP(layers=(0,), head_weights=((1.0,), (1.0,)))
    with pytest.raises(ValueError, match="equal length"):
        CATP(head_weights=((1.0,), (1.0, 2.0)))
    with pytest.raises(ValueError, match="at least one"):
        CATP(layers=())


def test_cross_attention_is_mean_log_attention_standardised_by_image_and_head() -> None:
    observation = seen()
    head_scores = CrossAttention().head_scores(observation)
    for layer in range(3):
        for head in range(2):
            for image in range(2):
                rows = observation.values[Signal.CROSS_ATTENTION, layer][image, head]
                mean = torch.stack([torch.stack([p.log() for p in row]).mean() for row in rows])
                expected = (mean - mean.mean()) / mean.std(correction=0)
                torch.testing.assert_close(head_scores[image, layer, head], expected)
    assert torch.allclose(head_scores.mean(-1), torch.zeros(2, 3, 2, dtype=torch.float64))


def test_region_attention_is_the_log_of_attention_weighted_by_what_each_image_token_receives() -> None:
    observation = seen()
    head_scores = RegionAttention().head_scores(observation)
    received = observation[Signal.VISION_ATTENTION_RECEIVED]
    for layer in range(3):
        for head in range(2):
            for image in range(2):
                rows = observation.values[Signal.CROSS_ATTENTION, layer][image, head]
                on_regions = [
                    sum(float(received[image, patch]) * float(row[patch]) for patch in range(7)) for row in rows
                ]
                logs = torch.tensor(on_regions, dtype=torch.float64).log()
                expected = (logs - logs.mean()) / logs.std(correction=0)
                torch.testing.assert_close(head_scores[image, layer, head], expected)
    only = RegionAttention(layers=(1,), head_weights=((0.5, -2.0),)).score(observation)
    torch.testing.assert_close(only, 0.5 * head_scores[:, 1, 0] - 2 * head_scores[:, 1, 1])
    assert RegionAttention(layers=(1,)).needs == {Signal.CROSS_ATTENTION: (1,), Signal.VISION_ATTENTION_RECEIVED: None}
    scaled = seen()
    scaled.values[Signal.VISION_ATTENTION_RECEIVED] = 100 * received
    torch.testing.assert_close(RegionAttention().head_scores(scaled), head_scores, msg="only proportions count")


@pytest.mark.parametrize("name", ["catp", "cross-attention", "region-attention", "self-attention"])
def test_slot_weights_are_added_to_what_the_heads_say(name: str) -> None:
    observation, weights = seen(), (0.5, -1.0, 0.0, 2.0, 0.25)
    heads = {"layers": [0, 2], "head_weights": [[1.0, -0.5], [0.0, 2.0]]}
    plain = PruningPolicy(name, heads).build_scorer().score(observation)
    policy = PruningPolicy(name, {**heads, "slot_weights": list(weights)}, "dpp", {"similarity": "regions"}, keep=2)
    found = policy.build_scorer().score(observation)
    for image in range(2):
        for slot in range(5):
            assert float(found[image, slot]) == pytest.approx(float(plain[image, slot]) + weights[slot], abs=1e-12)
    again = PruningPolicy.from_dict(json.loads(json.dumps(policy.to_dict())))
    assert again == policy and again.build_scorer() == policy.build_scorer()
    assert again.build_selector() == policy.build_selector() == DPP(similarity="regions")
    assert torch.equal(again.build_scorer().score(observation), found)


def test_as_many_slot_weights_as_tokens_are_needed_and_numbers() -> None:
    for scorer in (CrossAttention(slot_weights=(1.0,) * 4), SCORERS["position"](weights=(1.0,) * 4)):  # type: ignore[call-arg]
        with pytest.raises(ValueError, match="there are 4 slot weights; an image of this model has 5 tokens"):
            scorer.score(seen())
    with pytest.raises(PolicyError, match="slot_weights of scorer 'region-attention' is"):
        PruningPolicy("region-attention", {"slot_weights": ["much", 1.0]})
    weighted = SCORERS["position"](weights=(0.0, 3.0, 1.0, -1.0, 2.0)).score(seen())  # type: ignore[call-arg]
    assert weighted.argsort(1, descending=True).tolist() == [[1, 4, 2, 0, 3]] * 2


def test_self_attention_sums_what_all_layers_and_heads_pay() -> None:
    observation = seen()
    expected = sum(observation.values[Signal.SELF_ATTENTION, layer].sum(1) for layer in range(3))
    torch.testing.assert_close(SelfAttention().score(observation), expected)


def test_the_controls_are_their_definitions() -> None:
    observation = seen(tokens=8)
    norm = SCORERS["l2-norm"]().score(observation)
    torch.testing.assert_close(norm, observation[Signal.IMAGE_FEATURES].pow(2).sum(-1).sqrt())
    assert SCORERS["position"]().score(observation)[0].argsort(descending=True).tolist() == list(range(8))
    order = Stride().score(observation)[0].argsort(descending=True).tolist()
    assert sorted(order[:4]) == [0, 2, 4, 6] and sorted(order[:2]) == [0, 4] and sorted(order) == list(range(8))


def test_a_checksum_reads_part_of_a_large_image_and_all_of_a_small_one() -> None:
    assert fingerprint(torch.ones(1, 3, 96, 96)).tolist() == [2957913452127585907], "calibrations draw from it"
    large = torch.randn(9, 3, 336, 336)  # more than are read together
    changed = large.clone()
    changed[0, :, 100:104, 100:104] += 1  # a small part of one image
    before, after = fingerprint(large), fingerprint(changed)
    assert before[0] != after[0] and torch.equal(before[1:], after[1:])
    assert torch.equal(fingerprint(large[1:]), before[1:]) and torch.equal(fingerprint(large[8:]), before[8:])


def test_random_is_drawn_from_seed_and_image_alone() -> None:
    pixels = torch.randn(6, 3, 8, 8)
    images = fingerprint(pixels)
    assert images.unique().numel() == 6
    assert torch.equal(fingerprint(pixels[3:5]), images[3:5])
    assert not torch.equal(fingerprint(pixels.flip(-1)), images), "order of pixels matters"
    observation = Observation.of_equal(6, 32, {}, {Signal.IMAGE_HASH: images})
    scores = Random(seed=1).score(observation)
    alone = Random(seed=1).score(Observation.of_equal(1, 32, {}, {Signal.IMAGE_HASH: images[2:3]}))
    assert torch.equal(alone[0], scores[2])
    assert not torch.equal(Random(seed=2).score(observation), scores)
    many = uniform(mix(torch.arange(2000)), 50)
    assert many.min() >= 0 and many.max() < 1
    assert abs(many.mean() - 0.5) < 0.005 and abs(many.var() - 1 / 12) < 0.002
    ranks = many.argsort(1).argsort(1).float().mean(0)  # every token is as likely as every other
    assert (ranks - 24.5).abs().max() < 1.5


def test_splitmix64_is_the_published_one() -> None:
    assert mix(torch.tensor(0)).item() & (2**64 - 1) == 0xE220A8397B1DCDAF  # first output of seed 0


def test_needs_join_to_what_any_method_reads() -> None:
    cross, own = Signal.CROSS_ATTENTION, Signal.SELF_ATTENTION
    joined = join([CATP(layers=(2,)).needs, CATP(layers=(0, 2)).needs, SelfAttention().needs, {own: (1,)}])
    assert joined == {cross: (0, 2), own: None}
