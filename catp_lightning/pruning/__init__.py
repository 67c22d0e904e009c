"""Pruning: `prune(model, policy)` drops visual tokens of every prompt while its context lasts."""

from catp_lightning.pruning.pruner import prune
from catp_lightning.pruning.record import Pruning

__all__ = ["Pruning", "prune"]
