"""Selectors, by their name in a policy."""

from catp_lightning.methods.registry import Registry
from catp_lightning.methods.selectors.base import Selector
from catp_lightning.methods.selectors.conditional_dpp import ConditionalDPP
from catp_lightning.methods.selectors.context_merge import ContextMerge
from catp_lightning.methods.selectors.dart import DART
from catp_lightning.methods.selectors.dpp import DPP
from catp_lightning.methods.selectors.facility_location import FacilityLocation
from catp_lightning.methods.selectors.grid import Grid
from catp_lightning.methods.selectors.max_min import MaxMin
from catp_lightning.methods.selectors.pool import Pool
from catp_lightning.methods.selectors.prune_similar import PruneSimilar
from catp_lightning.methods.selectors.recycle import Recycle
from catp_lightning.methods.selectors.top_k import TopK
from catp_lightning.methods.selectors.union import Union
from catp_lightning.methods.selectors.vscan import VScan

_OWN: dict[str, type[Selector]] = {
    "top-k": TopK,
    "dpp": DPP,
    "union": Union,
    "dart": DART,
    "recycle": Recycle,
    "prune-similar": PruneSimilar,
    "context-merge": ContextMerge,
    "max-min": MaxMin,
    "facility-location": FacilityLocation,
    "conditional-dpp": ConditionalDPP,
    "grid": Grid,
    "pool": Pool,
    "vscan": VScan,
}
SELECTORS = Registry("selector", Selector, _OWN)
"""Selectors by name: those of this package, and those of other packages' entry points of `catp_lightning.selectors`."""

__all__ = [
    "DART",
    "DPP",
    "SELECTORS",
    "ConditionalDPP",
    "ContextMerge",
    "FacilityLocation",
    "Grid",
    "MaxMin",
    "Pool",
    "PruneSimilar",
    "Recycle",
    "Selector",
    "TopK",
    "Union",
    "VScan",
]
