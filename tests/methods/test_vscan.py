"""VScan's first stage, against a version with loops written from its definition."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from catp_lightning import PolicyError, PruningPolicy
from catp_lightning.methods.observation import Observation, Signal, Values
from catp_lightning.methods.selectors.vscan import VScan

SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.floats(0.01, 1.0)), min_size=1, max_size=3)


def slow_vscan(scores: list[float], rows: list[list[float]], count: int, window: int) -> dict[int, int]:
    """For each token of one image the token that carries it; rows are early attention, part, line, column, features."""
    windows: dict[Any, list[int]] = {}
    for token, (_, part, line, column, *_rest) in enumerate(rows):
        if line >= 0:
            windows.setdefault((part, line // window, column // window), []).append(token)
    each = (count // 2) // max(1, len(windows))
    kept: list[int] = []
    for own in windows.values():
        kept += sorted(own, key=lambda token: -rows[token][0])[:each]
    others = [token for token in range(len(rows)) if token not in kept]
    kept += sorted(others, key=lambda token: -scores[token])[: count - len(kept)]
    carrier = {token: token for token in kept}
    for token in others:
        if token not in carrier:
            carrier[token] = max(sorted(kept), key=lambda other: alike(rows[token][4:], rows[other][4:]))
    return carrier


def alike(one: list[float], other: list[float]) -> float:
    size = math.hypot(*one) * math.hypot(*other)
    return round(sum(a * b for a, b in zip(one, other, strict=True)) / size, 5) if size else 0.0


def image(high: int, wide: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = high * wide
    lines = torch.stack([torch.arange(tokens) // wide, torch.arange(tokens) % wide], 1)
    lines[:: 7 + seed % 5] = -1  # stand for no patch
    part = (torch.arange(tokens) >= tokens * 2 // 3).long()[:, None]
    early = torch.rand(tokens, 1, generator=generator, dtype=torch.float64)
    features = torch.randn(tokens, 6, generator=generator, dtype=torch.float64)
    return torch.rand(tokens, generator=generator, dtype=torch.float64), torch.cat([early, part, lines, features], 1)


@given(SHAPES, st.integers(0, 1000), st.integers(1, 4))
def test_half_of_the_budget_goes_to_windows_and_all_other_tokens_are_carried(
    shapes: list[tuple[int, int, float]], seed: int, window: int
) -> None:
    rows = [image(high, wide, seed + n) for n, (high, wide, _) in enumerate(shapes)]
    counts = [math.ceil(keep * high * wide) for high, wide, keep in shapes]
    scores, vectors = (pad_sequence(parts, True, 7.0) for parts in zip(*rows, strict=True))
    visual = torch.arange(scores.shape[1]) < torch.tensor([[len(own)] for own, _ in rows])
    found = VScan(window=window).select(scores, visual, torch.tensor(counts), vectors)
    assert found.destination is not None
    for row, (own, values) in enumerate(rows):
        expected = slow_vscan(own.tolist(), values.tolist(), counts[row], window)
        assert found.destination[row].tolist() == [expected.get(t, -1) for t in range(visual.shape[1])]
        assert found.keep[row].sum() == counts[row]


def test_of_96_tokens_of_llava_48_are_three_of_each_of_16_windows() -> None:
    places = torch.stack([torch.zeros(576), torch.arange(576) // 24, torch.arange(576) % 24], 1)
    early, scores = torch.rand(576), torch.arange(576.0)
    vectors = torch.cat([early[:, None], places, torch.randn(576, 8)], 1)[None]
    keep = VScan().select(scores[None], torch.ones(1, 576, dtype=torch.bool), torch.tensor([96]), vectors).keep[0]
    grid, high = keep.view(4, 6, 4, 6).transpose(1, 2).reshape(16, 36), early.view(4, 6, 4, 6).transpose(1, 2)
    best = high.reshape(16, 36).topk(3).indices
    assert grid.gather(1, best).all() and keep.sum() == 96
    left = keep.clone().view(4, 6, 4, 6).transpose(1, 2).reshape(16, 36).scatter(1, best, False)
    assert left.sum() == 48, "the other half has the highest scores"
    assert scores[keep].min() > 576 - 96 - 48 or scores[keep].sort(descending=True).values[47] >= 576 - 96


@pytest.mark.parametrize(("layers", "early"), [(23, 5), (24, 5), (4, 0), (1, 0), (12, 2)])
def test_the_local_scan_reads_the_layer_as_far_in_as_the_sixth_of_llavas(layers: int, early: int) -> None:
    maps = torch.rand(layers, 1, 2, 9)
    values: Values = {(Signal.VISION_ATTENTION, layer): maps[layer] for layer in range(layers)}
    values[Signal.PATCH_POSITION] = torch.zeros(1, 9, 3, dtype=torch.int64)
    values[Signal.IMAGE_FEATURES] = torch.rand(1, 9, 5)
    seen = Observation.of_equal(1, 9, {Signal.VISION_ATTENTION: layers}, values)
    assert torch.equal(VScan().vectors(seen)[0, :, 0], maps[early, 0].mean(0))
    assert torch.equal(VScan(layer=0).vectors(seen)[0, :, 0], maps[0, 0].mean(0))
    assert VScan(layer=0).needs[Signal.VISION_ATTENTION] == (0,) and VScan().needs[Signal.VISION_ATTENTION] is None


@pytest.mark.parametrize(("args", "says"), [({"window": 0}, "window is 0; it is"), ({"per": "sample"}, "per is")])
def test_arguments_that_mean_nothing_are_refused(args: dict[str, Any], says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        PruningPolicy("fastervlm", selector="vscan", selector_args=args)
