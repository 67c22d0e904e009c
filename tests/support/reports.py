"""Policies that carry what a real calibration measured."""

from pathlib import Path
from typing import Any

from catp_lightning import PruningPolicy
from catp_lightning.callbacks import CrossAttentionCalibration
from tests.support.calibrations import data
from tests.support.models import faint_blip2, greedily
from tests.support.modules import Generating
from tests.support.trainers import loading, trainer


def calibrated(path: Path, **settings: Any) -> list[PruningPolicy]:
    """By a real calibration of a small model."""
    callback = CrossAttentionCalibration(path, **settings)
    trainer(callback).predict(Generating(faint_blip2(0.2), greedily(1)), loading(data(48, 16)))
    return callback.policies
