"""Lightning callbacks."""

from catp_lightning.callbacks.answer_writer import AnswerWriter
from catp_lightning.callbacks.calibration import CrossAttentionCalibration
from catp_lightning.callbacks.token_pruning import TokenPruning

__all__ = ["AnswerWriter", "CrossAttentionCalibration", "TokenPruning"]
