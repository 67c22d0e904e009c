"""Policies: what a calibration decided, as a frozen dataclass with a JSON form, and the places they are read from."""

from catp_lightning.policy.budgets import UNITS, Budget, check_keep, check_price
from catp_lightning.policy.policy import PruningPolicy
from catp_lightning.policy.schedules import SCHEDULES
from catp_lightning.policy.stages import Stage

__all__ = ["SCHEDULES", "UNITS", "Budget", "PruningPolicy", "Stage", "check_keep", "check_price"]
