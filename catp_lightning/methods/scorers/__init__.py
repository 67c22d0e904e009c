"""Scorers, by their name in a policy."""

from catp_lightning.methods.registry import Registry
from catp_lightning.methods.scorers.base import AttentionScorer, Scorer
from catp_lightning.methods.scorers.catp import CATP
from catp_lightning.methods.scorers.cdpruner import CDPruner
from catp_lightning.methods.scorers.controls import Grid, L2Norm, Position, Random, Stride
from catp_lightning.methods.scorers.cross_attention import CrossAttention
from catp_lightning.methods.scorers.dart import DART
from catp_lightning.methods.scorers.divprune import DivPrune
from catp_lightning.methods.scorers.downsample import Downsample
from catp_lightning.methods.scorers.dyvte import DyVTE
from catp_lightning.methods.scorers.fastervlm import FasterVLM
from catp_lightning.methods.scorers.fastv import FastV, PyramidDrop
from catp_lightning.methods.scorers.flashsloth import FlashSloth
from catp_lightning.methods.scorers.learned import Learned
from catp_lightning.methods.scorers.quecc import QueCC
from catp_lightning.methods.scorers.region_attention import RegionAttention
from catp_lightning.methods.scorers.self_attention import SelfAttention
from catp_lightning.methods.scorers.sgl import SGL
from catp_lightning.methods.scorers.sparsevlm import SparseVLM
from catp_lightning.methods.scorers.trained import Compressor, Trained
from catp_lightning.methods.scorers.trimmed_llama import TrimmedLlama
from catp_lightning.methods.scorers.visionzip import VisionZip
from catp_lightning.methods.scorers.vispruner import VisPruner
from catp_lightning.methods.scorers.visual_exit import VisualExit
from catp_lightning.methods.scorers.vtc_cls import VTCCLS

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
    "learned": Learned,
    "quecc": QueCC,
    "flashsloth": FlashSloth,
    "dyvte": DyVTE,
    "l2-norm": L2Norm,
    "position": Position,
    "stride": Stride,
    "grid": Grid,
    "downsample": Downsample,
    "random": Random,
}
SCORERS = Registry("scorer", Scorer, _OWN)
"""Scorers by name: those of this package, and those of other packages' entry points of `catp_lightning.scorers`."""

__all__ = [
    "CATP",
    "DART",
    "SCORERS",
    "SGL",
    "VTCCLS",
    "AttentionScorer",
    "CDPruner",
    "Compressor",
    "CrossAttention",
    "DivPrune",
    "Downsample",
    "DyVTE",
    "FastV",
    "FasterVLM",
    "FlashSloth",
    "Grid",
    "L2Norm",
    "Learned",
    "Position",
    "PyramidDrop",
    "QueCC",
    "Random",
    "RegionAttention",
    "Scorer",
    "SelfAttention",
    "SparseVLM",
    "Stride",
    "Trained",
    "TrimmedLlama",
    "VisPruner",
    "VisionZip",
    "VisualExit",
]
