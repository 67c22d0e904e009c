"""Calibrations that are interrupted and gone on with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from catp_lightning.calibration import checkpoint as resume
from catp_lightning.calibration.settings import CalibrationSettings
from catp_lightning.calibration.split import part_of
from catp_lightning.callbacks import calibration
from catp_lightning.callbacks.calibration import CrossAttentionCalibration
from catp_lightning.utils.hashing import fingerprint
from tests.support import calibrations
from tests.support.models import random_inputs
from tests.support.modules import Generating
from tests.support.trainers import Stream

BATCHES, BATCH = 7, 5
BROKEN = 5


class Breaking(Generating):
    """Raises at the batch BROKEN."""

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int = 0) -> Tensor:
        if batch_idx == BROKEN:
            raise RuntimeError("planted")
        return super().predict_step(batch, batch_idx)


def sorted_batches() -> list[dict[str, Tensor]]:
    """Sorted by part of the split, backwards: every stage has batches without a sample for it, the first among them."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        samples = random_inputs(8, BATCHES * BATCH, True, torch.float32)
    order = part_of(fingerprint(samples["pixel_values"])).argsort(descending=True, stable=True)
    return [{name: value[some] for name, value in samples.items()} for some in order.split(BATCH)]


ROUNDS = CalibrationSettings(first_round=10, probes=4, folds=2)
"""Two rounds on few samples, and few probes."""


def calibrate(
    path: Path,
    module: Generating | None = None,
    batches: list[dict[str, Tensor]] | Stream | None = None,
    keep: Any = 0.25,
    promise: float | None = None,
    **settings: Any,
) -> CrossAttentionCalibration:
    """Calibrate, by default a small BLIP-2 on `sorted_batches`, and in one process."""
    module, batches = Generating() if module is None else module, sorted_batches() if batches is None else batches
    return calibrations.calibrate(module, batches, path, keep, promise, ROUNDS, **{"devices": 1, **settings})


def small(patch: Callable[[Any, str, Any], None]) -> None:
    """Savings every two batches, and no report."""
    patch(resume, "EVERY", 2)
    patch(calibration, "report", lambda *_: [])


PARTIAL = "p.json.partial-0.safetensors"


def read(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(file, framework="pt") as content:
        return content.metadata(), {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
