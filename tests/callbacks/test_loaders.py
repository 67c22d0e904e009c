"""Loaders that cannot be read again in the same order, or are too small, are refused before anything is measured."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, Sampler

from catp_lightning import PolicyError, PruningError
from catp_lightning.calibration.replay import memory
from catp_lightning.calibration.replay.base import Replay
from catp_lightning.calibration.split import round_bounds
from catp_lightning.callbacks import CrossAttentionCalibration
from tests.support.calibrations import data
from tests.support.interrupted_calibrations import sorted_batches
from tests.support.modules import Generating
from tests.support.sent_signals import quick
from tests.support.small_calibrations import QUICKEST
from tests.support.trainers import loading, trainer

pytestmark = pytest.mark.usefixtures("no_report")


def sorted_samples() -> list[dict[str, Tensor]]:
    return [{name: value[n] for name, value in batch.items()} for batch in sorted_batches() for n in range(5)]


class Turning(Sampler[int]):
    """Another order each time, without chance."""

    def __init__(self) -> None:
        self.readings = 0

    def __iter__(self) -> Any:
        self.readings += 1
        return iter(range(self.readings, self.readings + 4))

    def __len__(self) -> int:
        return 4


def refused(path: Path, loader: Any, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> str:
    monkeypatch.setattr(Replay, "answer_log_probability", lambda *args: pytest.fail("this is measured"))
    callback = CrossAttentionCalibration(path / "new" / "p.json", settings=QUICKEST, **settings)
    with pytest.raises((PolicyError, PruningError)) as told:
        trainer(callback, devices=1).predict(Generating(), loader)
    assert not list(path.iterdir())
    return str(told.value)


@pytest.mark.parametrize("kind", ["shuffle", "random", "own", "without batches", "iterator"])
def test_a_loader_of_another_order_each_time_is_refused_before_anything_is_measured(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, samples = sorted_batches(), sorted_samples()
    loader = {
        "shuffle": lambda: DataLoader(samples, batch_size=5, shuffle=True),  # type: ignore[arg-type]
        "random": lambda: DataLoader(samples, batch_size=5, sampler=RandomSampler(range(35), num_samples=30)),  # type: ignore[arg-type]
        "own": lambda: DataLoader(samples, batch_size=2, sampler=Turning()),  # type: ignore[arg-type]
        "without batches": lambda: DataLoader(batches, batch_size=None, shuffle=True),  # type: ignore[arg-type]
        "iterator": lambda: iter(batches),
    }[kind]()
    said = refused(tmp_path, loader, monkeypatch)
    assert "reads its split several times" in said
    assert ("is an iterator" if kind == "iterator" else "gives another order each time") in said


@pytest.mark.parametrize("whole", [True, False])
def test_a_promise_that_the_split_is_too_small_for_is_refused_before_anything_is_measured(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, samples = sorted_batches(), sorted_samples()
    loader = loading(batches) if whole else DataLoader(samples, batch_size=5)  # type: ignore[arg-type]
    said = refused(tmp_path, loader, monkeypatch, max_disagreement=0.02)
    assert f"at most {70 if whole else 35} samples" in said and "takes at least 149 there" in said


@pytest.mark.slow
def test_a_split_in_one_order_is_not_disturbed_by_looking_at_it(tmp_path: Path, undisturbed: bytes) -> None:
    samples = sorted_samples()
    loader = DataLoader(samples, batch_size=5)  # type: ignore[arg-type]
    trainer(quick(tmp_path / "p.json"), devices=1).predict(Generating(), loader)
    assert (tmp_path / "p.json").read_bytes() == undisturbed
    assert torch.equal(torch.stack([s["pixel_values"] for s in samples[:5]]), sorted_batches()[0]["pixel_values"])


def test_a_loader_that_cannot_be_read_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LIMIT", 0)

    class Once(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __init__(self) -> None:
            self.left = data(24, 8)

        def __iter__(self) -> Iterator[Any]:
            while self.left:
                yield self.left.pop()

    run = trainer(quick(tmp_path / "p.json"))
    with pytest.raises(PruningError, match="gave 3 batches at first and 0 when asked again"):
        run.predict(Generating(), loading(Once()))
    assert not (tmp_path / "p.json").exists()


@pytest.mark.slow
def test_every_pass_sees_the_batches_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits, several loaders and a module's own transfer hooks apply to all passes."""

    monkeypatch.setattr(memory, "LIMIT", 0)

    class Counting(Generating):
        def __init__(self) -> None:
            super().__init__()
            self.steps: list[tuple[int, ...]] = []

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch["outer"]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch["inner"]

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
            self.steps.append((dataloader_idx, batch_idx))
            return super().predict_step(batch, batch_idx)

    module = Counting()
    loader = loading([{"outer": {"inner": batch}} for batch in data(40, 8)])
    callback = quick(tmp_path / "p.json")
    trainer(callback, limit_predict_batches=3).predict(module, [loader, loader])
    samples = callback.policies[0].evidence["samples"]
    assert sum(samples.values()) == 2 * 24
    passes = 2 + len(round_bounds(samples["learn"], QUICKEST.first_round))
    assert len(module.steps) == passes * 6
    assert module.steps == module.steps[:6] * passes
