"""Scorers by the name a policy calls them."""

from catp_lightning.scorers.base import AttentionScorer, Scorer
from catp_lightning.scorers.catp import CATP
from catp_lightning.scorers.controls import L2Norm, Position, Random, Stride
from catp_lightning.scorers.cross_attention import CrossAttention
from catp_lightning.scorers.fastervlm import FasterVLM
from catp_lightning.scorers.fastv import FastV, PyramidDrop
from catp_lightning.scorers.region_attention import RegionAttention
from catp_lightning.scorers.self_attention import SelfAttention
from catp_lightning.scorers.trimmed_llama import TrimmedLlama

SCORERS: dict[str, type[Scorer]] = {
    "catp": CATP,
    "cross-attention": CrossAttention,
    "region-attention": RegionAttention,
    "self-attention": SelfAttention,
    "fastervlm": FasterVLM,
    "fastv": FastV,
    "pyramiddrop": PyramidDrop,
    "trimmed-llama": TrimmedLlama,
    "l2-norm": L2Norm,
    "position": Position,
    "stride": Stride,
    "random": Random,
}

__all__ = ["SCORERS", "AttentionScorer", "Scorer"]
