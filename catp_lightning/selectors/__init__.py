"""Selectors by the name a policy calls them."""

from catp_lightning.selectors.base import Selector, without_autocast
from catp_lightning.selectors.dpp import DPP
from catp_lightning.selectors.top_k import TopK
from catp_lightning.selectors.union import Union

SELECTORS: dict[str, type[Selector]] = {"top-k": TopK, "dpp": DPP, "union": Union}

__all__ = ["SELECTORS", "Selector", "without_autocast"]
