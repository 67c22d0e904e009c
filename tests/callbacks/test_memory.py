"""What a calibration holds: recorded batches if they fit, so that the step runs once, and little else."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache

from catp_lightning import CrossAttentionCalibration
from catp_lightning.calibration.fit.probing import Probing
from catp_lightning.calibration.fit.sums import ProbeSums
from catp_lightning.calibration.replay import memory
from catp_lightning.calibration.replay.groups import Groups
from catp_lightning.calibration.replay.memory import Memory
from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.calibration.search.race import Check
from catp_lightning.callbacks import calibration_run
from catp_lightning.callbacks.calibration_run import CalibrationRun
from tests.support import family_calibrations
from tests.support.families import ROWS
from tests.support.modules import Generating
from tests.support.recorded_answers import forward, mixed, model, record
from tests.support.small_calibrations import QUICKEST, Counting, data
from tests.support.trainers import loading, trainer

pytestmark = pytest.mark.usefixtures("no_report")

PROMISE: dict[str, Any] = {"max_disagreement": 0.87, "confidence": 0.5}
KINDS = {
    "one budget": {"keep": 0.5},
    "perturbed": {"keep": [0.5, 0.25], "augment": ["noise"]},
    "promised to groups": {"keep": [0.5, 0.25], **PROMISE, "group_by": "kind"},
}


class Grouped(Counting):
    """Takes a field that its model does not know out of the batch."""

    def predict_step(self, batch: dict[str, Any], batch_idx: int = 0) -> Tensor:
        batch.pop("kind")
        return super().predict_step(batch, batch_idx)


def calibrated(path: Path, **settings: Any) -> tuple[bytes, int]:
    """Calibrate on 32 samples in 4 batches; return the bytes of the policies and how often the model was asked."""
    module = Grouped()
    batches: list[dict[str, Any]] = [{**batch, "kind": ["a", "b"] * 4} for batch in data()]
    callback = CrossAttentionCalibration(path, **settings, settings=QUICKEST, examples=0)
    trainer(callback, devices=1).predict(module, loading(batches))
    return b"".join(file.read_bytes() for file in sorted(path.glob("*.json"))), module.steps


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_step_runs_once_on_each_batch_and_the_policy_is_that_of_running_it_for_every_pass(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, once = calibrated(tmp_path / "held", **KINDS[kind])
    monkeypatch.setattr(memory, "LIMIT", 0)
    again, often = calibrated(tmp_path / "again", **KINDS[kind])
    assert held and held == again
    copies = len(KINDS[kind].get("augment", ()))
    assert once == 4 * (1 + copies) and often >= 4 * once


def test_a_run_that_was_interrupted_in_a_later_pass_goes_on_by_reading_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = calibrated(tmp_path / "whole", keep=0.5, scorer="catp")

    def broken(*_: Any) -> None:
        raise RuntimeError("planted")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="planted"):
        patch.setattr(Check, "compare", broken)
        calibrated(tmp_path / "part", keep=0.5, scorer="catp")
    found, steps = calibrated(tmp_path / "part", keep=0.5, scorer="catp")
    assert found == expected and steps > 4, "nothing of the interrupted run is in memory"


def samples_of(images: list[int]) -> Samples:
    with torch.no_grad():
        _, samples = record(model(), forward, mixed(images))
    groups = Groups.of({"kind": ["a"] * len(images)}, "kind")
    return Samples(samples.replay, samples.seen, samples.images, samples.inside, groups)


def tensors(samples: Samples) -> list[Tensor]:
    found: list[Tensor] = []

    def noted(value: Tensor) -> Tensor:
        found.append(value)
        return value

    samples.each(noted)
    return found


def test_a_held_batch_comes_back_as_it_was_and_shares_no_memory_with_what_was_recorded() -> None:
    held, samples = Memory(1), samples_of([1, 2, 0])
    before = [value.clone() for value in tensors(samples)]
    held.add(0, [(samples, [samples])])
    for value in tensors(samples):
        value.zero_()
    ((found, (copy,)),) = held.batch(0)
    for one in (found, copy):
        assert len(before) > 10 and all(map(torch.equal, tensors(one), before))
    assert found.replay.prompt.arguments == {}, "pixels are not held"  # type: ignore[attr-defined]


def test_batches_are_held_only_if_all_of_them_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = [(samples_of([1, 1]), [])]
    size = sum(value.nbytes for value in tensors(batch[0][0]))
    for limit, expected, held in ((4 * size, 4, 4), (4 * size - 1, 4, 0), (3 * size, float("inf"), 0), (0, 4, 0)):
        monkeypatch.setattr(memory, "LIMIT", limit)
        some = Memory(expected)
        for number in range(4):
            some.add(number, batch)
            if expected == 4:
                assert some.has_all(number + 1) == bool(held), "the first batch tells"
        assert some.has_all(held)


def test_batches_after_one_that_is_missing_are_not_held() -> None:
    some, batch = Memory(3), [(samples_of([1]), [])]
    some.add(1, batch)
    some.add(2, batch)
    assert not some.has_all(3) and some.has_all(0)


def alive(kind: type) -> int:
    """Return how many objects of a class Python's collector knows."""
    return sum(issubclass(type(one), kind) for one in gc.get_objects())


@pytest.mark.parametrize("name", ["Blip2-OPT", "Blip2-T5", "Llava", "Mllama"])
def test_a_batch_is_measured_after_its_cache_is_gone_and_without_the_sums_of_earlier_passes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "LIMIT", 0)
    monkeypatch.setattr(calibration_run, "LARGE", 0)  # the sums of a tiny model are small
    measure, seen, sums = CalibrationRun.measure, list[int](), dict[str, int]()

    def watched(run: CalibrationRun, *args: Any) -> None:
        seen.append(alive(Cache))
        sums[run.now.title] = alive(ProbeSums)
        measure(run, *args)

    (row,) = (one for one in ROWS if one.name == name)
    gc.collect()
    caches, others = alive(Cache), alive(ProbeSums)
    monkeypatch.setattr(CalibrationRun, "measure", watched)
    callback = CrossAttentionCalibration(tmp_path, keep=0.5, settings=QUICKEST, examples=0)
    module = Generating(row.model(), family_calibrations.SETTINGS)
    trainer(callback).predict(module, loading(family_calibrations.data(row)))
    assert seen and set(seen) == {caches}, "no answer's keys and values are held beside its prompt"
    assert sums[Probing.title] > others
    assert sums["checking the chosen policies"] == others
