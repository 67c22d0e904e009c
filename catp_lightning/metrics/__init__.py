"""Metrics of the tables: VQA accuracy, agreement with the unpruned model, visual tokens kept."""

from catp_lightning.metrics.intervals import wilson_interval
from catp_lightning.metrics.pruning import Agreement, TokensKept
from catp_lightning.metrics.vqa import VQAAccuracy, normalise_answer, vqa_score

__all__ = ["Agreement", "TokensKept", "VQAAccuracy", "normalise_answer", "vqa_score", "wilson_interval"]
