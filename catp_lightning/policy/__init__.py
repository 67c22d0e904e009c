"""Policies: what a calibration decided, as a frozen dataclass with a JSON form, and the places they are read from."""

from catp_lightning.policy.policy import Budget, PruningPolicy, check_keep

__all__ = ["Budget", "PruningPolicy", "check_keep"]
