"""Methods of token pruning: the signals they read, scorers, selectors, and how many tokens a budget keeps.

What another package needs to bring a method of its own is here; methods themselves are in `scorers` and `selectors`.
"""

from catp_lightning.methods.method import Method
from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.scorers import SCORERS, AttentionScorer, Scorer
from catp_lightning.methods.selection import Selection
from catp_lightning.methods.selectors import SELECTORS, Selector
from catp_lightning.methods.selectors.base import FeatureSelector, ranked

__all__ = [
    "SCORERS",
    "SELECTORS",
    "AttentionScorer",
    "FeatureSelector",
    "Method",
    "Needs",
    "Observation",
    "Scorer",
    "Selection",
    "Selector",
    "Signal",
    "ranked",
]
