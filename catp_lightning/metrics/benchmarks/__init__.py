"""Metrics of evaluation data sets, as their authors' scorers compute them, by the names that readers give."""

from torchmetrics import Metric

from catp_lightning.metrics.benchmarks.docvqa import ANLS
from catp_lightning.metrics.benchmarks.easyvqa import EasyVQAAccuracy
from catp_lightning.metrics.benchmarks.gqa import GQAAccuracy
from catp_lightning.metrics.benchmarks.mean_score import MeanScore
from catp_lightning.metrics.benchmarks.mmbench import MMBenchAccuracy
from catp_lightning.metrics.benchmarks.mme import MMEScores
from catp_lightning.metrics.benchmarks.mvbench import MVBenchAccuracy
from catp_lightning.metrics.benchmarks.ocrbench import OCRBenchScore
from catp_lightning.metrics.benchmarks.pope import POPEScores
from catp_lightning.metrics.benchmarks.refcoco import RefCOCOAccuracy
from catp_lightning.metrics.benchmarks.scienceqa import ScienceQAAccuracy
from catp_lightning.metrics.benchmarks.ten_answers import TextVQAAccuracy, VizWizAccuracy
from catp_lightning.metrics.benchmarks.videomme import VideoMMEAccuracy

BENCHMARKS: dict[str, type[Metric]] = {
    "docvqa": ANLS,
    "easyvqa": EasyVQAAccuracy,
    "gqa": GQAAccuracy,
    "mmbench": MMBenchAccuracy,
    "mme": MMEScores,
    "mvbench": MVBenchAccuracy,
    "ocrbench": OCRBenchScore,
    "pope": POPEScores,
    "refcoco": RefCOCOAccuracy,
    "scienceqa": ScienceQAAccuracy,
    "textvqa": TextVQAAccuracy,
    "videomme": VideoMMEAccuracy,
    "vizwiz": VizWizAccuracy,
}
"""Metric of each data set, by the name in `metric` of its batches. Each has `update(predictions, references)`, with the
batch's references, and `compute()`, which returns figures by name; `score(prediction, reference)` is the share, in
[0, 1], that one answer has of the mean score."""

REPORTED: dict[str, tuple[str, ...]] = {
    "mmbench": ("accuracy", "circular_accuracy"),
    "mme": ("perception", "cognition"),
    "ocrbench": ("score",),
    "pope": ("f1",),
    "videomme": ("accuracy", "answered"),
}
"""Figures that are reported for a data set, by its metric, where they are not the mean of `score` over questions."""

__all__ = [
    "ANLS",
    "BENCHMARKS",
    "REPORTED",
    "EasyVQAAccuracy",
    "GQAAccuracy",
    "MMBenchAccuracy",
    "MMEScores",
    "MVBenchAccuracy",
    "MeanScore",
    "OCRBenchScore",
    "POPEScores",
    "RefCOCOAccuracy",
    "ScienceQAAccuracy",
    "TextVQAAccuracy",
    "VideoMMEAccuracy",
    "VizWizAccuracy",
]
