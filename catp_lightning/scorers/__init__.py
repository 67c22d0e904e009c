"""Scorers, by their name in a policy."""

from catp_lightning.scorers.base import AttentionScorer, Scorer
from catp_lightning.scorers.catp import CATP
from catp_lightning.scorers.cdpruner import CDPruner
from catp_lightning.scorers.controls import Grid, L2Norm, Position, Random, Stride
from catp_lightning.scorers.cross_attention import CrossAttention
from catp_lightning.scorers.dart import DART
from catp_lightning.scorers.divprune import DivPrune
from catp_lightning.scorers.downsample import Downsample
from catp_lightning.scorers.fastervlm import FasterVLM
from catp_lightning.scorers.fastv import FastV, PyramidDrop
from catp_lightning.scorers.region_attention import RegionAttention
from catp_lightning.scorers.registry import Registry
from catp_lightning.scorers.self_attention import SelfAttention
from catp_lightning.scorers.sgl import SGL
from catp_lightning.scorers.sparsevlm import SparseVLM
from catp_lightning.scorers.trimmed_llama import TrimmedLlama
from catp_lightning.scorers.visionzip import VisionZip
from catp_lightning.scorers.vispruner import VisPruner
from catp_lightning.scorers.visual_exit import VisualExit
from catp_lightning.scorers.vtc_cls import VTCCLS

_OWN: dict[str, type[Scorer]] = {
    "catp": CATP,
    "cross-attention": CrossAttention,
    "region-attention": RegionAttention,
    "self-attention": SelfAttention,
    "fastervlm": FasterVLM,
    "vtc-cls": VTCCLS,
    "vispruner": VisPruner,
    "visionzip": VisionZip,
    "divprune": DivPrune,
    "cdpruner": CDPruner,
    "fastv": FastV,
    "pyramiddrop": PyramidDrop,
    "sparsevlm": SparseVLM,
    "dart": DART,
    "visual-exit": VisualExit,
    "trimmed-llama": TrimmedLlama,
    "sgl": SGL,
    "l2-norm": L2Norm,
    "position": Position,
    "stride": Stride,
    "grid": Grid,
    "downsample": Downsample,
    "random": Random,
}
SCORERS = Registry(_OWN)
"""Scorers by name: those of this package, and those of other packages' entry points of `catp_lightning.scorers`."""

__all__ = ["SCORERS", "AttentionScorer", "Scorer"]
