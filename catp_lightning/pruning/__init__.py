"""Pruning: `prune(model, policy)` drops visual tokens of every prompt while its context lasts."""

from catp_lightning.pruning.pruner import Pruning, prune

__all__ = ["Pruning", "prune"]
