"""Calibrations of the smallest model, on a disk that can be filled up."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from catp_lightning import CrossAttentionCalibration
from catp_lightning.calibration.settings import CalibrationSettings
from tests.support.models import TINY, greedily, random_blip2, random_inputs
from tests.support.modules import Generating
from tests.support.trainers import loading, trainer


class Counting(Generating):
    """Generates two tokens; `steps` counts what its model was asked."""

    def __init__(self) -> None:
        super().__init__(random_blip2(shape=TINY)[0], greedily(2))
        self.steps = 0

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int = 0) -> Tensor:
        self.steps += 1
        return super().predict_step(batch, batch_idx)


def data() -> list[dict[str, Tensor]]:
    """32 samples in 4 batches."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        samples = random_inputs(TINY.queries, 32, True, torch.float32, 6)
    return [{name: value[n : n + 8] for name, value in samples.items()} for n in range(0, 32, 8)]


QUICKEST = CalibrationSettings(probes=2, sizes=(0.25,), folds=2, first_round=8)
"""The fewest probes and folds, and several rounds on few samples: for what does not depend on what is found."""


def calibrate(path: Path, *callbacks: Callback, **settings: Any) -> CrossAttentionCalibration:
    callback = CrossAttentionCalibration(path, keep=0.5, scorer="catp", settings=QUICKEST)
    predict(*callbacks, callback, **settings)
    return callback


def predict(*callbacks: Callback, **settings: Any) -> Any:
    return trainer(*callbacks, **{"devices": 1, **settings}).predict(Counting(), loading(data()))


@contextmanager
def full_disk(most: int) -> Iterator[None]:
    """No file of this process can be larger than so many bytes: a real error of the system for whoever writes on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
