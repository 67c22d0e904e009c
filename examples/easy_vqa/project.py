"""What the scripts share: where things are, the budgets, and the trained model beside its data."""

import argparse
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from model import PROMPT

from catp_lightning import VQAModule
from catp_lightning.data.benchmarks import BenchmarkDataModule, EasyVQA

KEEPS = (0.5, 0.25, 0.125, 0.0625)  # 41, 21, 11 and 6 of 81 visual tokens
TESTS = ("single", "scenes")
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def options(description: str | None, **more: Any) -> argparse.Namespace:
    """Parse the command line: --out, --threads, and an option for each of `more`, with its default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/easy_vqa"), help="folder of data, model and results")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    for name, default in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    return given


def read_model(out: Path) -> VQAModule:
    return VQAModule(str(out / "model"), generation={"max_new_tokens": 2})  # a word and the end


def read_data(out: Path, test: str = "scenes") -> BenchmarkDataModule:
    return BenchmarkDataModule(
        str(out / "model"),
        calibration=EasyVQA(str(out / "data/calibration")),
        test=EasyVQA(str(out / "data" / test)),
        prompt=PROMPT,
        batch_size=64,
    )


def trainer(*callbacks: Any) -> Trainer:
    return Trainer(**QUIET, callbacks=list(callbacks))
