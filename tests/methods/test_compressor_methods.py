"""Compressors' rows are their equations', worked out token by token; regions are those of the image's grid."""

import base64
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional as F

from catp_lightning import PolicyError, PruningPolicy
from catp_lightning.methods.observation import Observation, Signal
from catp_lightning.methods.regions import regions, shape
from catp_lightning.methods.scorers import SCORERS
from catp_lightning.methods.weights import encoded
from tests.support.compressors import COMPRESSORS, compressor

SIDE, WIDE, FEATURES, WIDTH, HEADS = 6, 9, 12, 8, 4


def seen(high: int = SIDE, wide: int = WIDE, features: int = FEATURES, words: int = 5) -> Observation:
    """Two images of one grid, float64; the second is asked a shorter question."""
    tokens, draw = high * wide, torch.Generator().manual_seed(1)
    place = torch.cartesian_prod(torch.zeros(1), torch.arange(float(high)), torch.arange(float(wide))).long()
    text = torch.arange(words) < torch.tensor([[words], [words - 2]])
    values: Any = {
        Signal.IMAGE_EMBEDS: torch.randn(2, tokens, features, generator=draw, dtype=torch.float64),
        Signal.TEXT_EMBEDS: torch.randn(2, words, features, generator=draw, dtype=torch.float64) * text[..., None],
        Signal.PATCH_POSITION: place.expand(2, -1, -1),
    }
    return Observation(torch.ones(2, tokens, dtype=torch.bool), {}, values, text=text)


def drawn(name: str, tokens: int) -> Any:
    return PruningPolicy(**compressor(name, tokens, features=FEATURES, width=WIDTH)).build_scorer()


def normed(row: Tensor) -> Tensor:
    return (row - row.mean()) / (row.var(unbiased=False) + 1e-5).sqrt()


def attention(query: Tensor, keys: list[Tensor], values: list[Tensor], bias: Tensor) -> tuple[Tensor, list[float]]:
    """What one query reads, and pays each key in the mean over heads; bias [heads, keys]."""
    size, read, paid = len(query) // HEADS, [], torch.zeros(len(keys), dtype=torch.float64)
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        logits = torch.stack([query[part] @ key[part] for key in keys]) / math.sqrt(size) + bias[head]
        weights = logits.softmax(0)
        paid += weights / HEADS
        read.append(sum(weight * value[part] for weight, value in zip(weights, values, strict=True)))
    return torch.cat(read), paid.tolist()


def finished(w: dict[str, Tensor], embeds: Tensor, paid: list[float], hidden: Tensor) -> Tensor:
    scale = embeds.square().mean().sqrt()
    change = w["up"] @ F.gelu(w["mix"] @ hidden + w["bias"])
    return sum(weight * row for weight, row in zip(paid, embeds, strict=True)) + scale * change


def test_quecc_is_its_equation() -> None:
    scorer, given = drawn("quecc", 6), seen()
    w = {name: weight.double() for name, weight in scorer.weights_like(torch.zeros(1)).items()}
    written, stay = scorer.written(given), scorer.score(given).bool()
    lines, columns = 2, 3  # of regions: 3 x 3 tokens each, a cell is a token
    assert stay[0].nonzero()[:, 0].tolist() == [10, 13, 16, 37, 40, 43], "the middle of each region"
    for image in range(2):
        embeds, asked = given[Signal.IMAGE_EMBEDS][image], given.text[image]  # type: ignore[index]
        x = [w["down"] @ normed(row) for row in embeds]
        words = [w["asked"] @ normed(row) for row in given[Signal.TEXT_EMBEDS][image][asked]]
        question = sum(words) / len(words)
        for region in range(lines * columns):
            top, left = region // columns * 3, region % columns * 3
            cells = [x[(top + cell // 3) * WIDE + left + cell % 3] + question for cell in range(9)]
            grown = sum(w["kernel"][cell] * cells[cell] for cell in range(9))
            away = torch.tensor(
                [[((t // WIDE - top - 1) / 3) ** 2 + ((t % WIDE - left - 1) / 3) ** 2] for t in range(SIDE * WIDE)],
                dtype=torch.float64,
            )[:, 0]
            bias = -F.softplus(w["local"])[:, None] * away
            read, paid = attention(
                w["query"] @ grown, [w["key"] @ row for row in x], [w["value"] @ row for row in x], bias
            )
            expected = finished(w, embeds, paid, grown + read)
            at = (top + 1) * WIDE + left + 1
            torch.testing.assert_close(written[image, at], expected, atol=1e-10, rtol=0)
    assert torch.equal(written[~stay], given[Signal.IMAGE_EMBEDS][~stay]), "what leaves is as it was"


def test_flashsloth_is_its_equation() -> None:
    scorer, given = drawn("flashsloth", 8), seen()
    w = {name: weight.double() for name, weight in scorer.weights_like(torch.zeros(1)).items()}
    assert len(w["queries"]) == 2
    written, stay = scorer.written(given), scorer.score(given).bool()
    at = [10, 13, 16, 37, 40, 43, SIDE * WIDE - 2, SIDE * WIDE - 1]
    assert stay[0].nonzero()[:, 0].tolist() == at, "the middle of each region, and the last tokens"
    for image in range(2):
        embeds, asked = given[Signal.IMAGE_EMBEDS][image], given.text[image]  # type: ignore[index]
        x = [w["down"] @ normed(row) for row in embeds]
        words = [w["asked"] @ normed(row) for row in given[Signal.TEXT_EMBEDS][image][asked]]
        for region in range(6):
            own = [t for t in range(SIDE * WIDE) if (t // WIDE // 3) * 3 + t % WIDE // 3 == region]
            scores = torch.stack([w["weigh"] @ F.gelu(w["see"] @ x[t] + w["seen"]) for t in own]).softmax(0)
            paid = [float(scores[own.index(t)]) if t in own else 0.0 for t in range(SIDE * WIDE)]
            expected = finished(w, embeds, paid, sum(p * row for p, row in zip(paid, x, strict=True)))  # type: ignore[arg-type]
            torch.testing.assert_close(written[image, at[region]], expected, atol=1e-10, rtol=0)
        for number, query in enumerate(w["queries"]):
            nothing = torch.zeros(HEADS, 1, dtype=torch.float64)
            told = query + attention(w["query"] @ query, words, words, nothing)[0]
            read, paid = attention(
                w["ask"] @ told, [w["key"] @ row for row in x], [w["value"] @ row for row in x], nothing
            )
            expected = finished(w, embeds, paid, told + read)
            torch.testing.assert_close(written[image, at[6 + number]], expected, atol=1e-10, rtol=0)


def test_regions_are_rectangles_of_the_grid_that_cover_it_and_middles_differ() -> None:
    for high, wide, count, further in ((12, 12, 16, 0), (5, 7, 6, 2), (4, 40, 12, 4), (3, 5, 4, 1), (10, 10, 7, 3)):
        given = seen(high, wide, features=1)
        found = regions(given, count, further, on_grid=True)
        lines, columns = shape(high, wide, count)
        assert len({*found.at[0].tolist()}) == count + further and found.at.max() < high * wide
        assert found.region[0].unique().tolist() == list(range(count))
        grid, sizes = found.region[0].view(high, wide), set()
        for region in range(count):
            at, inside = (grid == region).nonzero(), int(found.at[0, region])
            top, left = at.amin(0).tolist()
            bottom, right = at.amax(0).tolist()
            assert len(at) == (bottom - top + 1) * (right - left + 1), "a rectangle"
            assert grid[inside // wide, inside % wide] == region, "its middle lies in it"
            sizes.add((bottom - top, right - left))
        assert len(sizes) <= 4 and (lines * columns == count)


@pytest.mark.parametrize("spoil", ["order", "part", "hole"])
def test_tokens_that_are_not_all_patches_of_one_grid_are_a_sequence(spoil: str) -> None:
    given, line = seen(6, 6, features=1), seen(1, 36, features=1)
    places = given[Signal.PATCH_POSITION].clone()
    if spoil == "order":
        places[:, [3, 4]] = places[:, [4, 3]]
    elif spoil == "part":
        places[:, 20:, 0] = 1
    else:
        places[:, -1, 2] += 1
    given.values[Signal.PATCH_POSITION] = places
    found, expected = regions(given, 4, 1, on_grid=True), regions(line, 4, 1, on_grid=False)
    for name in ("region", "cell", "place", "centre", "at"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_protected_tokens_stay_and_belong_to_no_region() -> None:
    given = seen(4, 4)
    given.protected = torch.zeros_like(given.valid)
    given.protected[:, [0, 7]] = True
    scorer = drawn("quecc", 3)
    stay, written = scorer.score(given).bool(), scorer.written(given)
    assert stay[:, [0, 7]].all() and stay.sum(1).tolist() == [5, 5]
    assert torch.equal(written[:, [0, 7]], given[Signal.IMAGE_EMBEDS][:, [0, 7]])
    other = seen(4, 4)
    other.protected = given.protected
    other[Signal.IMAGE_EMBEDS][:, [0, 7]] = 99.0
    rows = [image[keep & ~own] for image, keep, own in zip(written, stay, given.protected, strict=True)]
    again = [image[keep & ~own] for image, keep, own in zip(scorer.written(other), stay, given.protected, strict=True)]
    torch.testing.assert_close(rows, again)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_prompt_without_text_is_compressed_to_finite_rows(name: str) -> None:
    given = seen()
    given.text = torch.zeros_like(given.text)
    given.values[Signal.TEXT_EMBEDS] = torch.zeros_like(given[Signal.TEXT_EMBEDS])
    assert drawn(name, 4).written(given).isfinite().all()


def change(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[dict[str, Any]], None]:
    def changed(args: dict[str, Any]) -> None:
        weights = load(base64.b64decode(args["weights"]))
        edit(weights)
        args["weights"] = base64.b64encode(save({name: part.contiguous() for name, part in weights.items()})).decode()

    return changed


DAMAGED: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda args: args.update(weights="%%"), "weights are not base64 of safetensors"),
    (lambda args: args.update(weights=args["weights"][:400]), "weights are not base64 of safetensors"),
    (lambda args: args.update(weights=3), "weights of scorer 'quecc' is 3"),
    (lambda args: args.update(tokens=None), "tokens is None; a compressor with weights writes a number of rows"),
    (lambda args: args.update(tokens=0), "tokens is 0"),
    (change(lambda weights: weights.pop("up")), "weights are .*there should be .*up"),
    (change(lambda weights: weights.update(more=torch.zeros(1))), "weights are .*more.*there should be"),
    (change(lambda weights: weights.update(up=weights["up"].float())), "up of the weights is torch.float32"),
    (change(lambda weights: weights.update(up=weights["up"][:, :4])), r"up of the weights .* \[12, 4\]; it is finite"),
    (change(lambda weights: weights.update(bias=weights["bias"] * torch.nan)), "bias of the weights .*finite float16"),
    (change(lambda weights: weights.update(kernel=weights["kernel"][:4])), "are of 4 cells and 4 heads; there are 9"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGED)
def test_damaged_weights_are_refused_when_the_policy_is_read(damage: Callable[[Any], Any], says: str) -> None:
    fields = compressor(features=FEATURES, width=WIDTH)
    damage(fields["scorer_args"])
    with pytest.raises(PolicyError, match=says):
        PruningPolicy(**fields)


def test_other_networks_are_refused_too() -> None:
    scorer = drawn("flashsloth", 8)
    few = {"weights": scorer.weights, "tokens": 2}
    with pytest.raises(PolicyError, match="have 2 queries; that leaves none of 2 tokens"):
        PruningPolicy("flashsloth", few, keep=2)
    for args, says in (({"threshold": 1.5}, "threshold is 1.5; it is a likelihood"), ({"first": 0}, "first is 0")):
        with pytest.raises(PolicyError, match=says):
            PruningPolicy("dyvte", args)


@pytest.mark.parametrize("name", ["quecc", "flashsloth", "dyvte"])
def test_weights_come_back_as_float16_and_rounded_ones_as_they_were(name: str) -> None:
    empty: Any = SCORERS[name]()
    weights = empty.initial(empty.sizes_for(FEATURES, WIDTH, 4), torch.Generator().manual_seed(0))
    half = {key: value.half() for key, value in weights.items()}
    more = {} if name == "dyvte" else {"tokens": 4}
    scorer = type(empty)(weights=encoded(half), **more)
    assert all(torch.equal(scorer.weights_like(torch.zeros(1))[key], half[key].float()) for key in weights)
    assert scorer.with_weights(weights) == scorer
