"""Statistics that a calibration reports beside its choice, one file each."""

from catp_lightning.calibration.statistics.base import Statistic
from catp_lightning.calibration.statistics.rank_correlation import RankCorrelation

STATISTICS: tuple[type[Statistic], ...] = (RankCorrelation,)
"""Statistics in the order of the report."""

__all__ = ["STATISTICS", "Statistic"]
