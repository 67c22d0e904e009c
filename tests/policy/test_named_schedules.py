"""Published methods of several stages by name: their stages, what a layer reads, and that they prune as they say."""

from typing import Any

import pytest
import torch

from catp_lightning import PolicyError, PruningPolicy, prune
from catp_lightning.methods.schedule import visits
from catp_lightning.policy import SCHEDULES
from tests.support.families import BY_NAME
from tests.support.stages import LAYERS, deep

every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def test_vscan_keeps_96_of_576_tokens_and_32_from_layer_16_on_for_64_on_average() -> None:
    policy = PruningPolicy.schedule("vscan", keep=64 / 576, depth=32)
    assert visits(policy.steps(), 576, 32) == (96,) * 16 + (32,) * 16
    quarter = PruningPolicy.schedule("vscan", keep=1 / 9, depth=28)
    assert quarter.keep == pytest.approx(0.167, abs=1e-3) and quarter.then[0].scorer_args["layer"] == 14


def test_uniprunebenchs_pair_keeps_half_from_layer_2_on() -> None:
    policy = PruningPolicy.schedule("divprune+fastv", keep=0.111 * 30 / 2 / 28, depth=28)
    assert visits(policy.steps(), 1000, 28) == (111,) * 2 + (56,) * 26


@every_schedule
@pytest.mark.parametrize("depth", [3, 4, 28, 32])
@pytest.mark.parametrize("keep", [0.01, 0.25, 0.5, 0.9, 1.0])
def test_a_layer_reads_the_budget_on_average(name: str, depth: int, keep: float) -> None:
    read = visits(PruningPolicy.schedule(name, keep, depth).steps(), 10_000, depth)
    assert sum(read) / depth / 10_000 == pytest.approx(keep, abs=2e-4)
    assert list(read) == sorted(read, reverse=True)


@every_schedule
@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("row", [deep(BY_NAME[name]) for name in ("Llava", "InternVL", "Qwen2.5-VL")], ids=repr)
def test_schedules_prune_models_as_predicted_and_load_as_they_were_saved(name: str, row: Any, tmp_path: Any) -> None:
    policy = PruningPolicy.schedule(name, keep=0.4, depth=LAYERS)
    assert PruningPolicy.load(policy.save(tmp_path / "policy.json")) == policy
    model, inputs = row.model(torch.float32), row.inputs([0], dtype=torch.float32)
    with prune(model, policy) as pruning:
        assert model(**inputs).logits.isfinite().all()
    assert pruning.last is not None
    assert pruning.last.per_layer.tolist() == [list(visits(policy.steps(), int(pruning.last.counts), LAYERS))]


@pytest.mark.parametrize(
    ("name", "keep", "depth", "says"),
    [
        ("vscam", 0.5, 32, r"no schedule 'vscam'\. There are vscan, .* Did you mean 'vscan'"),
        ("vscan", 16, 32, "keep is 16; of a schedule it is the share"),
        ("vscan", 0.0, 32, "keep is 0.0; of a schedule"),
        ("vscan", 0.5, 2, "depth is 2; it is the decoder's number of layers"),
    ],
)
def test_what_is_no_schedule_is_refused(name: str, keep: Any, depth: int, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        PruningPolicy.schedule(name, keep, depth)
