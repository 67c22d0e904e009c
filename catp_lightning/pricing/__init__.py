"""Prices of prompts: what a schedule costs in tokens, FLOPs, bytes and seconds, and how much may stay for a price."""

from catp_lightning.pricing.prices import COUNTED, Prices, Unit
from catp_lightning.pricing.profile import PrefillProfile
from catp_lightning.pricing.prompts import Prompts
from catp_lightning.pricing.solve import keep_at, largest, tokens_read
from catp_lightning.pricing.timing import measure

__all__ = [
    "COUNTED",
    "PrefillProfile",
    "Prices",
    "Prompts",
    "Unit",
    "keep_at",
    "largest",
    "measure",
    "tokens_read",
]
