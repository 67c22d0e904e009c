"""Calibrations of small models, as a user runs them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from catp_lightning import CrossAttentionCalibration, PruningPolicy
from catp_lightning.calibration.settings import DEFAULTS, CalibrationSettings
from catp_lightning.utils.hashing import fingerprint
from tests.support.models import random_inputs
from tests.support.trainers import loading, trainer

QUICK = CalibrationSettings(probes=4, sizes=(0.25,))
"""Few probes: for what does not depend on weights that are worth having."""


def data(count: int, batch: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """Return `count` samples for a BLIP-2 of 8 queries, the same each time, in batches."""
    torch.manual_seed(7)
    samples = random_inputs(8, count, True, dtype)
    return [{name: value[start : start + batch] for name, value in samples.items()} for start in range(0, count, batch)]


def calibrate(
    module: L.LightningModule,
    batches: Iterable[dict[str, Tensor]],
    path: Path,
    keep: Any = 0.5,
    promise: float | None = None,
    calibration: CalibrationSettings = DEFAULTS,
    **settings: Any,
) -> CrossAttentionCalibration:
    """Calibrate in a Trainer with these settings, and return the callback; `promise` is its max_disagreement."""
    callback = CrossAttentionCalibration(path, keep=keep, max_disagreement=promise, settings=calibration)
    trainer(callback, **settings).predict(module, loading(batches))
    return callback


def figures(policy: PruningPolicy, name: str) -> dict[str, Any]:
    """Return what a calibration measured of a candidate."""
    return next(row for row in policy.evidence["candidates"] if row["name"] == name)


def images_of(batches: Iterable[dict[str, Tensor]]) -> Tensor:
    """Return the fingerprints of their images, int64 [N]."""
    return fingerprint(torch.cat([batch["pixel_values"] for batch in batches]))
