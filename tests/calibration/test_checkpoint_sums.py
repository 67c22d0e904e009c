"""Sums that are restored from a partial file go on as if never saved."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from catp_lightning import PolicyError
from catp_lightning.calibration.checkpoint import CalibrationCheckpoint
from catp_lightning.calibration.fit.sums import ProbeSums
from tests.support.partial_files import metrics, update

pytestmark = pytest.mark.usefixtures("small_calibrations")


def states(found: dict[str, Metric]) -> list[Tensor]:
    values = [value for metric in found.values() for value in metric.metric_state.values()]
    return [torch.cat(value) if isinstance(value, list) else value for value in values]


@pytest.mark.parametrize("inference", [False, True])
def test_restored_sums_are_the_same_to_the_bit_and_go_on(tmp_path: Path, inference: bool) -> None:
    """In inference mode too, where Lightning reads the split."""
    with torch.inference_mode(inference):
        through, before = metrics(), metrics()
        partial = CalibrationCheckpoint(tmp_path / "sums", {"a": 1.5})
        assert partial.begin("probe", before) == 0
        for number in range(4):
            update(through, number)
            update(before, number)
            partial.add((number, 0), before)
    again = CalibrationCheckpoint(tmp_path / "sums", {"a": 1.5})
    with torch.inference_mode(inference):
        after = metrics()
        assert again.begin("probe", after) == 4
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(states(after), states(before), strict=True))
        update(through, 4)
        update(after, 4)
        assert all(map(torch.equal, states(after), states(through)))


def test_sums_for_another_task_are_forgotten_with_all_that_follow(tmp_path: Path) -> None:
    """Another process began anew and found something else: this one's rounds were for other candidates."""
    partial = CalibrationCheckpoint(tmp_path / "sums", {})
    for task in ("probe", "round 1", "round 2"):
        found = metrics()
        partial.begin(task, found)
        for number in range(2):
            update(found, number)
            partial.add((number, 0), found)
        partial.finish(2, found)
    again = CalibrationCheckpoint(tmp_path / "sums", {})
    assert [again.begin(task, metrics()) for task in ("probe", "round 1 of others", "round 2")] == [2, 0, 0]


def test_sums_of_another_shape_are_refused(tmp_path: Path) -> None:
    partial, found = CalibrationCheckpoint(tmp_path / "sums", {}), metrics()
    partial.begin("probe", found)
    update(found, 0)
    partial.add((0, 0), found)
    partial.finish(1, found)
    other = {**metrics(), "probes": ProbeSums(4, folds=2)}
    with pytest.raises(PolicyError, match=r"made by another version: its probes/gram is \(2, 6\)"):
        CalibrationCheckpoint(tmp_path / "sums", {}).begin("probe", other)
