"""A calibration that was interrupted goes on from its partial file, and another one is refused by name."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from catp_lightning import PolicyError
from catp_lightning.calibration.replay import memory
from catp_lightning.callbacks import calibration
from tests.support.interrupted_calibrations import PARTIAL, Breaking, calibrate, read, sorted_batches
from tests.support.models import greedily
from tests.support.modules import Generating
from tests.support.partial_files import signed, without
from tests.support.trainers import Stream

pytestmark = pytest.mark.usefixtures("small_calibrations")


def changed_weight() -> Generating:
    module = Generating()
    weight = module.net.language_model.model.decoder.layers[1].fc1.weight
    weight.data[17, 5] = torch.nextafter(weight[17, 5], torch.tensor(9.0))
    return module


def changed_image() -> list[dict[str, Tensor]]:
    batches = sorted_batches()
    batches[2]["pixel_values"][3, 0, 0, 0] += 1e-3
    return batches


def changed_text() -> list[dict[str, Tensor]]:
    batches = sorted_batches()
    batches[2]["input_ids"][3, -1] += 1
    return batches


def changed_order() -> list[dict[str, Tensor]]:
    batches = sorted_batches()
    return [batches[0], batches[2], batches[1], *batches[3:]]


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "budget": (lambda: {"keep": 0.5}, r"keep was \['0.25'\], is \['0.5'\]"),
    "share or tokens": (lambda: {"keep": 1}, r"keep was \['0.25'\], is \['1'\]"),
    "promise": (lambda: {"keep": None, "promise": 0.1}, r"promise was None, is \[0.1, 0.95\]"),
    "one weight": (lambda: {"module": changed_weight()}, r"model was [0-9a-f]{16}, is [0-9a-f]{16}\."),
    "precision": (lambda: {"precision": "bf16-mixed"}, "precision was 32-true, is bf16-mixed"),
    "number of batches": (lambda: {"batches": sorted_batches()[:3]}, r"batches was \['7'\], is \['3'\]"),
    "limit of batches": (lambda: {"limit_predict_batches": 5}, r"batches was \['7'\], is \['5'\]"),
    "image": (
        lambda: {"batches": changed_image()},
        "other data: batch 2 had fingerprint [0-9a-f]{16}, now [0-9a-f]{16}",
    ),
    "question": (lambda: {"batches": changed_text()}, "other data: batch 2 had fingerprint"),
    "order": (lambda: {"batches": changed_order()}, "batch 1 .* which was batch 2: the order changed"),
    "generation settings": (
        lambda: {"module": Generating(settings=greedily(2, 1))},
        "other answers: those to batch 0 had fingerprint",
    ),
}
SPENT = 5000.0


@pytest.mark.slow
def test_the_cost_is_that_of_all_runs_whatever_the_clock_does(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = path.parent / PARTIAL
    metadata, tensors = read(file)
    assert 0 < float(metadata["seconds"]) < 600
    file.write_bytes(signed(tensors, **{**without(metadata), "seconds": repr(SPENT)}))
    told: list[float] = []
    monkeypatch.setattr(calibration, "report", lambda *given: told.extend(given[4:6]) or [])
    clock = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))  # set back again and again
    calibrate(path)
    seconds, plain = told
    assert 0 < plain < seconds - SPENT < 600


@pytest.mark.parametrize("seconds", ["-1594.0", "nan", "inf", "long"])
def test_a_partial_file_that_was_worked_on_for_no_possible_time_is_damaged(path: Path, seconds: str) -> None:
    file = path.parent / PARTIAL
    metadata, tensors = read(file)
    file.write_bytes(signed(tensors, **{**without(metadata), "seconds": seconds}))
    with pytest.raises(
        PolicyError, match=r"cannot be read as part of a calibration \(ValueError: (seconds is|could not)"
    ):
        calibrate(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_a_partial_file_of_another_calibration_is_refused_by_name(path: Path, name: str) -> None:
    what, message = REFUSED[name]
    before = (path.parent / PARTIAL).read_bytes()
    with pytest.raises(PolicyError, match=f"(?s){PARTIAL} is part of .*{message}.* delete the file to start anew"):
        calibrate(path, **what())
    assert [file.name for file in path.parent.iterdir()] == [PARTIAL]
    assert (path.parent / PARTIAL).read_bytes() == before


def test_fewer_batches_of_a_loader_without_a_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="planted"):
        calibrate(tmp_path / "p.json", Breaking(), Stream(sorted_batches()))
    before = (tmp_path / PARTIAL).read_bytes()
    with pytest.raises(PolicyError, match=r"calibration with more data: at least 4 batches, now 3. Go on with"):
        calibrate(tmp_path / "p.json", batches=Stream(sorted_batches()[:3]))
    assert (tmp_path / PARTIAL).read_bytes() == before


@pytest.mark.slow
def test_data_that_changes_between_two_readings_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LIMIT", 0)

    class Drifting(Stream):
        readings = 0

        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            self.readings += 1
            return ({**batch, "pixel_values": batch["pixel_values"] * self.readings} for batch in self.items)

    with pytest.raises(PolicyError, match=r"changed between two readings: batch 0 .*switch shuffling and random aug"):
        calibrate(tmp_path / "new" / "p.json", batches=Drifting(sorted_batches()))
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="planted"):
        calibrate(tmp_path / "p.json", Breaking(), Stream(sorted_batches()))
    with pytest.raises(PolicyError, match=rf"changed between two readings.*, and delete .*{PARTIAL} to start anew"):
        calibrate(tmp_path / "p.json", batches=Drifting(sorted_batches()))
    assert [file.name for file in tmp_path.iterdir()] == [PARTIAL], "hours of an older run are not thrown away"


def test_another_path_is_another_calibration(path: Path) -> None:
    with pytest.raises(RuntimeError, match="planted"):
        calibrate(path.parent / "other", Breaking())
    assert (path.parent / "other" / "policy.partial-0.safetensors").is_file()
    assert (path.parent / PARTIAL).is_file()
