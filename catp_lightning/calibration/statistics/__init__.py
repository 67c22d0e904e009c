"""Statistics that a calibration reports beside its choice, one file each."""

from catp_lightning.calibration.statistics.base import Statistic
from catp_lightning.calibration.statistics.rank_correlation import RankCorrelation
from catp_lightning.calibration.statistics.seen_images import SeenImages

STATISTICS: tuple[type[Statistic], ...] = (RankCorrelation, SeenImages)
"""Statistics in the order of the report."""

__all__ = ["STATISTICS", "Statistic"]
