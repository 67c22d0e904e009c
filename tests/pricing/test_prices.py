"""Prices by arithmetic are those that torch's counter and real caches show, wherever tokens leave."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from catp_lightning import PruningPolicy, prune
from catp_lightning.errors import PruningError
from catp_lightning.methods.selection import Selection
from catp_lightning.models import find_family
from catp_lightning.policy import Stage
from catp_lightning.pricing import COUNTED, Prices, Prompts
from catp_lightning.pruning.sites import SiteSettings, site_of
from tests.support.families import BY_NAME
from tests.support.matrix import EVERYTHING, MORE, ROWS, cases, uneven
from tests.support.prices import known, paid, prompts_of
from tests.support.rows import Row
from tests.support.stages import MODELS, deep

RECURRENT = {"Qwen3.5", "Qwen3.5-MoE", "LFM2-VL"}
TWO_ROUTERS = {"ERNIE-4.5-VL"}  # its experts are others for rows of images
HALF_SEEN = {"Mllama": [2], "Mllama, last text that sees no image": [1]}  # the last text does not see all images
QUICK = {"Llava", "Gemma3", "Blip2-T5"}


def model_of(row: Row, attention: str = "eager") -> Any:
    return row.model(torch.float32, attention)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.name, marks=() if row.name in QUICK else pytest.mark.slow)
        for row in (*ROWS, *MORE)
        if row.name not in RECURRENT | TWO_ROUTERS
    ],
)
def test_flops_and_bytes_are_torchs_count_where_tokens_leave_before_all_layers(row: Row) -> None:
    model = model_of(row)
    prices = Prices.of(find_family(model))
    for sample in range(len(row.samples())):
        if sample in HALF_SEEN.get(row.name, []):
            continue
        inputs = row.inputs([sample], dtype=torch.float32)
        prompts = prompts_of(row, inputs)
        assert known(prices, prompts) == (full := paid(row, model, inputs))
        with prune(model, EVERYTHING, choose=uneven([sample])) as pruning:
            less = paid(row, model, inputs)
        assert known(prices, prompts, pruning.last.per_layer) == less
        assert less != full or not prompts.tokens.any()


class Halves:
    """Half of what is there stays at each stage, or nothing; with `merge` the others are merged into the first."""

    def __init__(self, merge: bool = False, last: bool = False) -> None:
        self.merge, self.last, self.counts = merge, last, list[int]()

    def __call__(self, prompt: Any) -> Selection:
        there = prompt.tokens
        keep = there & (there.cumsum(1) <= (0 if self.last else (there.sum(1, keepdim=True) + 1) // 2))
        self.counts.append(int(keep.sum()))
        first = keep.long().argmax(1, keepdim=True).expand_as(keep)
        own = torch.arange(keep.shape[1]).expand_as(keep)
        destination = torch.where(keep, own, torch.where(there, first, -1))
        return Selection(keep, destination=destination) if self.merge else Selection(keep)

    def visual(self, stages: tuple[int, ...], tokens: Tensor, depth: int) -> Tensor:
        counts = [int(tokens), *self.counts]
        return torch.tensor([[counts[sum(stage <= layer for stage in stages)] for layer in range(depth)]])


INSIDE = [
    pytest.param(
        row, stages, choose, id=f"{row}, {stages}, {name}", marks=() if row.name in QUICK else pytest.mark.slow
    )
    for row in (*MODELS, deep(BY_NAME["Blip2-T5"]))
    for stages, choose, name in (
        ((1, 3), Halves, "dropped"),
        ((1, 3), partial(Halves, merge=True), "merged"),
        ((2,), partial(Halves, last=True), "all out"),
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(("row", "stages", "choose"), INSIDE)
def test_flops_and_bytes_are_torchs_count_where_tokens_leave_inside(
    row: Row, stages: tuple[int, ...], choose: Callable[[], Halves]
) -> None:
    model, halves = model_of(row), choose()
    family = find_family(model)
    inputs = row.inputs([1], dtype=torch.float32)
    prices, prompts = Prices.of(family), prompts_of(row, inputs)
    with site_of(family, halves, SiteSettings(stages)).installed():
        found = paid(row, model, inputs)
    visual = halves.visual(stages, prompts.tokens, prices.depth)
    assert len(visual.unique()) == 1 + len(halves.counts) - (halves.last and len(stages) > 1)
    assert known(prices, prompts, visual) == found


@pytest.mark.parametrize("row", MODELS[:3], ids=repr)
def test_flops_and_bytes_of_three_stages_are_torchs_count(row: Row) -> None:
    model = model_of(row)
    later = (Stage("fastv", {"layer": 1}), Stage("visual-exit", {"layer": 3}))
    prices, inputs = Prices.of(find_family(model)), row.inputs([1], dtype=torch.float32)
    halves = Halves()
    prompt = lambda tokens: type("Prompt", (), {"tokens": tokens})  # noqa: E731
    with prune(model, PruningPolicy("stride", then=later), choose=lambda t: halves(prompt(t)).keep) as pruning:
        found = paid(row, model, inputs)
    prompts = prompts_of(row, inputs)
    assert torch.equal(pruning.last.per_layer, halves.visual((0, 1, 3), prompts.tokens, prices.depth))
    assert known(prices, prompts, pruning.last.per_layer) == found


@pytest.mark.parametrize("name", ["Llava", "Qwen3-VL"])
def test_merged_tokens_cost_what_the_rows_that_stay_cost(name: str) -> None:
    row = BY_NAME[name]
    model = model_of(row)
    prices, inputs = Prices.of(find_family(model)), row.inputs([0], dtype=torch.float32)
    with prune(model, PruningPolicy("l2-norm", selector="context-merge", keep=0.5)) as pruning:
        found = paid(row, model, inputs)
    assert known(prices, prompts_of(row, inputs), pruning.last.per_layer) == found


@pytest.mark.slow
def test_scaled_dot_product_attention_costs_the_same() -> None:
    for row in (BY_NAME["Llava"], BY_NAME["Mllama"]):
        inputs = row.inputs([0], dtype=torch.float32)
        assert paid(row, model_of(row, "sdpa"), inputs) == paid(row, model_of(row), inputs)


def test_bytes_are_of_the_models_own_numbers() -> None:
    row = BY_NAME["Mistral3, sliding window"]
    for dtype in (torch.bfloat16, torch.float64):
        model, inputs = row.model(dtype, "eager"), row.inputs([0], dtype=dtype)
        assert known(Prices.of(find_family(model)), prompts_of(row, inputs)) == paid(row, model, inputs)


@pytest.mark.parametrize("name", ["Llava", "Blip2-T5", "Mllama", "Gemma3"])
def test_many_prompts_cost_what_each_costs(name: str) -> None:
    prices = Prices.of(find_family(model_of(BY_NAME[name])))
    many = Prompts.of(
        *(torch.tensor(x) for x in ([5, 9, 30], [16, 40, 0], [20, 40, 0], [2, 0, 0])),
    )
    visual = torch.tensor([[16, 4, 2, 1], [40, 40, 40, 3], [0, 0, 0, 0]])
    visual = torch.cat([visual, visual[:, -1:].expand(-1, 4)], 1)[:, : prices.depth]
    for unit in COUNTED:
        for given in (None, visual):
            each = [
                prices.price(
                    unit,
                    Prompts(*(getattr(many, part)[[at]] for part in ("text", "tokens", "image_rows", "blind"))),
                    None if given is None else given[[at]],
                )
                for at in range(3)
            ]
            assert torch.equal(prices.price(unit, many, given), torch.cat(each))
        full, less = prices.price(unit, many).sum(), prices.price(unit, many, visual).sum()
        assert prices.share(unit, many, visual) == less.item() / full.item()


def test_tokens_are_counted_after_the_last_stage_and_over_layers() -> None:
    prices = Prices("decoder", 4)
    prompts, visual = Prompts.of(torch.tensor([7]), torch.tensor([100])), torch.tensor([[100, 100, 30, 10]])
    assert prices.price("tokens", prompts, visual).tolist() == [10]
    assert prices.price("tokens_per_layer", prompts, visual).tolist() == [60.0]
    assert (prices.share("tokens", prompts, visual), prices.share("tokens_per_layer", prompts, visual)) == (0.1, 0.6)
    text = Prompts.of(torch.tensor([7]), torch.tensor([0]))
    assert prices.share("tokens", text, torch.tensor([[0, 0, 0, 0]])) == 1.0


@pytest.mark.parametrize("row", cases(lambda row: row.name in RECURRENT | TWO_ROUTERS))
def test_what_cannot_be_counted_exactly_is_refused(row: Row) -> None:
    model = model_of(row)
    prices, inputs = Prices.of(find_family(model)), row.inputs([0], dtype=torch.float32)
    prompts = prompts_of(row, inputs)
    with pytest.raises(PruningError, match=r"prefill_flops: .*Give the budget in tokens"):
        prices.price("prefill_flops", prompts)
    assert int(prices.price("tokens", prompts)) == int(prompts.tokens)
    if row.name in TWO_ROUTERS:
        assert int(prices.price("cache_bytes", prompts)) == paid(row, model, inputs)["cache_bytes"]


def test_weights_that_are_no_layer_of_a_known_kind_are_refused() -> None:
    family = find_family(BY_NAME["Llava"].make())
    family.decoder.get_submodule("layers.1.mlp").more = nn.Bilinear(3, 4, 5)
    prices = Prices.of(family)
    with pytest.raises(PruningError, match="LlamaDecoderLayer has weights weight in a Bilinear"):
        prices.check("prefill_flops")
    prices.check("cache_bytes")
