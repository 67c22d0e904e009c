"""Calibrated visual-token pruning for vision-language models in PyTorch Lightning."""

from importlib.metadata import PackageNotFoundError, version

from catp_lightning.callbacks import AnswerWriter, CrossAttentionCalibration, TokenPruning
from catp_lightning.errors import DataError, PolicyError, PruningError
from catp_lightning.module import PrunedModule
from catp_lightning.policy import PruningPolicy
from catp_lightning.pruning import Pruning, prune
from catp_lightning.vqa_module import VQAModule

__all__ = [
    "AnswerWriter",
    "CrossAttentionCalibration",
    "DataError",
    "PolicyError",
    "PrunedModule",
    "Pruning",
    "PruningError",
    "PruningPolicy",
    "TokenPruning",
    "VQAModule",
    "prune",
]

try:
    __version__ = version("catp-lightning")
except PackageNotFoundError:  # read from its sources, not installed
    __version__ = "unknown"
