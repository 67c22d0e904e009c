"""Metrics of evaluation data sets, as their authors' scorers compute them, by the names that readers give."""

from torchmetrics import Metric

from catp_lightning.metrics.benchmarks.gqa import GQAAccuracy
from catp_lightning.metrics.benchmarks.mean_score import MeanScore
from catp_lightning.metrics.benchmarks.pope import POPEScores
from catp_lightning.metrics.benchmarks.ten_answers import TextVQAAccuracy, VizWizAccuracy

BENCHMARKS: dict[str, type[Metric]] = {
    "gqa": GQAAccuracy,
    "pope": POPEScores,
    "textvqa": TextVQAAccuracy,
    "vizwiz": VizWizAccuracy,
}
"""Metric of each data set, by the name in `metric` of its batches. Each has `update(predictions, references)`, with the
batch's references, and `compute()`, which returns figures by name."""

__all__ = ["BENCHMARKS", "GQAAccuracy", "MeanScore", "POPEScores", "TextVQAAccuracy", "VizWizAccuracy"]
