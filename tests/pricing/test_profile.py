"""Profiles of prefill time: arithmetic under a clock that advances as rows are read, and their form in JSON."""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from catp_lightning import PruningPolicy
from catp_lightning.errors import PolicyError, PruningError
from catp_lightning.policy import Stage
from catp_lightning.pricing import PrefillProfile, Prompts, measure
from catp_lightning.pricing.timing import spread
from tests.support.families import BY_NAME
from tests.support.oracles import Inputs, hooked
from tests.support.rows import Row
from tests.support.stages import LLAMA

PROFILE = PrefillProfile(
    *("Model", "cpu", 2, 4, False), rows=((20, 1.0), (40, 2.0), (120, 10.0)), costs={"l2-norm with top-k": ((10, 0.5),)}
)
PROMPTS = Prompts.of(torch.tensor([20, 10]), torch.tensor([100, 0]))


class Clock:
    """Seconds that pass as layers read rows."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time

    @contextmanager
    def ticking(self, layers: list[Any], a_row: float) -> Iterator[None]:
        def read(layer: Any, args: Any, kwargs: Any) -> dict[str, Any]:
            hidden = args[0]
            self.time += a_row * hidden.shape[1]
            return {}

        with hooked(layers, read):
            yield


def read_in(model: Any) -> list[Any]:
    return [layer.mlp for layer in model.model.language_model.layers]  # rows that left do not come so far


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("catp_lightning.pricing.timing.ROUNDS", 1)
    monkeypatch.setattr("catp_lightning.pricing.timing.SHARES", (1 / 16, 1 / 2))


def batch_of(row: Row) -> tuple[Any, Inputs]:
    return row.model(torch.float32), row.inputs([1], dtype=torch.float32)


def test_a_profile_predicts_schedules_that_it_did_not_measure() -> None:
    (model, inputs), clock = batch_of(LLAMA), Clock()
    tokens = torch.tensor([18])  # of two images
    text = inputs["attention_mask"].sum(1) - tokens
    policies = [PruningPolicy("l2-norm"), PruningPolicy("fastv", {"layer": 1})]
    with clock.ticking(read_in(model), 0.25):
        profile = measure(model, inputs, policies, seconds=0, clock=clock)
    assert (profile.model, profile.batch_size, profile.depth) == ("LlavaForConditionalGeneration", 1, 4)
    prompts, later = Prompts.of(text, tokens), [Stage("fastv", {"layer": 3}, keep=0.25)]
    assert profile.seconds(prompts).tolist() == [0.25 * 4 * int(text + tokens)]
    policy = PruningPolicy("l2-norm", keep=0.5, then=later)
    assert profile.predict(policy, prompts).tolist() == [0.25 * (4 * int(text) + 3 * 9 + 5)]
    again = PrefillProfile.from_dict(json.loads(json.dumps(profile.to_dict())))
    assert again == profile


def test_the_vision_part_counts_only_where_it_is_observed() -> None:
    (model, inputs), clock = batch_of(LLAMA), Clock()
    calls = itertools.count()

    def slower(module: Any, args: Any, kwargs: Any) -> dict[str, Any]:
        clock.time += 100.0 + next(calls)  # a tower that takes longer from call to call
        return {}

    with (
        hooked([model.model.vision_tower], slower),
        clock.ticking(read_in(model), 0.25),
    ):
        policies = [PruningPolicy("l2-norm"), PruningPolicy("fastervlm")]
        profile = measure(model, inputs, policies, seconds=0, clock=clock)
    assert [cost for _, cost in profile.costs["l2-norm with top-k"]] == [0.0, 0.0, 0.0]
    assert all(cost == int(cost) != 0 for _, cost in profile.costs["fastervlm with top-k"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Blip2-T5", "Mllama", "Qwen2.5-VL"])
def test_every_way_of_reading_images_is_measured(name: str) -> None:
    row = BY_NAME[name]
    model, inputs = batch_of(row)
    policy = PruningPolicy("stride", keep=0.3)
    profile = measure(model, inputs, [policy], seconds=0)
    prompts = Prompts.of(torch.tensor([8]), torch.tensor([8]))
    assert profile.image_alone == (name == "Mllama")
    assert float(profile.predict(policy, prompts)) > 0
    assert all(seconds > 0 for _, seconds in profile.rows) and len(profile.rows) == 3


def test_seconds_are_between_the_measured_points_and_the_mean_over_layers() -> None:
    assert PROFILE.seconds(PROMPTS).tolist() == [10.0, 0.5]
    visual = torch.tensor([[100, 100, 10, 0], [0, 0, 0, 0]])
    assert PROFILE.seconds(PROMPTS, visual).tolist() == [(10 + 10 + 1.5 + 1) / 4, 0.5]


def test_the_cost_of_choosing_is_of_samples_that_have_images() -> None:
    found = PROFILE.predict(PruningPolicy("l2-norm", keep=0.1), PROMPTS)
    assert found.tolist() == [1.5 + 0.5, 0.5]
    assert PROFILE.share(PruningPolicy("l2-norm", keep=0.1), PROMPTS) == pytest.approx(2.5 / 10.5)
    assert PROFILE.share(PruningPolicy(keep=1.0), PROMPTS) == 1.0


def test_a_method_that_was_not_measured_is_refused_by_name() -> None:
    with pytest.raises(PolicyError, match="has no cost of catp with top-k, but of l2-norm with top-k"):
        PROFILE.predict(PruningPolicy(keep=0.5), PROMPTS)


def test_a_batch_without_an_image_is_refused() -> None:
    model = LLAMA.model(torch.float32)
    words = torch.tensor([[5, 6, 7]])
    with pytest.raises(PruningError, match="Give a batch with images"):
        measure(model, {"input_ids": words, "attention_mask": torch.ones_like(words)}, seconds=0)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 1.0])
def test_spread_tokens_are_a_share_of_each_sample(share: float) -> None:
    tokens = torch.arange(40) < torch.tensor([[40], [7], [0]])
    found = spread(share, tokens)
    assert found.sum(1).tolist() == [-(-share * n // 1) for n in (40, 7, 0)]
    assert not bool((found & ~tokens).any())
    gaps = found[0].nonzero()[:, 0].diff()
    assert not len(gaps) or gaps.max() - gaps.min() <= 1
