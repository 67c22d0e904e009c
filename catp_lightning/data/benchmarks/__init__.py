"""Readers for the official files of evaluation data sets, and the LightningDataModule that uses them."""

from catp_lightning.data.benchmarks.dataset import BenchmarkDataset
from catp_lightning.data.benchmarks.docvqa import DocVQA
from catp_lightning.data.benchmarks.easyvqa import EasyVQA
from catp_lightning.data.benchmarks.gqa import GQA
from catp_lightning.data.benchmarks.mmbench import MMBench
from catp_lightning.data.benchmarks.mme import MME
from catp_lightning.data.benchmarks.module import BenchmarkDataModule
from catp_lightning.data.benchmarks.mvbench import MVBench
from catp_lightning.data.benchmarks.ocrbench import OCRBench
from catp_lightning.data.benchmarks.pope import POPE
from catp_lightning.data.benchmarks.reader import Reader, Record
from catp_lightning.data.benchmarks.refcoco import RefCOCO
from catp_lightning.data.benchmarks.scienceqa import ScienceQA
from catp_lightning.data.benchmarks.textvqa import TextVQA
from catp_lightning.data.benchmarks.video_reader import VideoReader
from catp_lightning.data.benchmarks.videomme import VideoMME
from catp_lightning.data.benchmarks.vizwiz import VizWiz

__all__ = [
    "GQA",
    "MME",
    "POPE",
    "BenchmarkDataModule",
    "BenchmarkDataset",
    "DocVQA",
    "EasyVQA",
    "MMBench",
    "MVBench",
    "OCRBench",
    "Reader",
    "Record",
    "RefCOCO",
    "ScienceQA",
    "TextVQA",
    "VideoMME",
    "VideoReader",
    "VizWiz",
]
