"""Policies that many tests prune by."""

from catp_lightning import PruningPolicy

HALF = PruningPolicy(scorer="catp", keep=0.5)
QUARTER = HALF.with_keep(0.25)
