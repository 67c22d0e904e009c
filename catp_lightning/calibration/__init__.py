"""Calibration: what dropping visual tokens does to a model's own answers, measured on a split, decides a policy."""

from catp_lightning.calibration.settings import CalibrationSettings

__all__ = ["CalibrationSettings"]
