"""Data and prediction runs that several benchmarks share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from catp_lightning import PruningPolicy, TokenPruning, VQAModule
from catp_lightning.data.scenes import GRID, Split, write_scenes
from catp_lightning.data.vqa import VQABatch, VQASplit

QUIET: dict[str, Any] = {
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def predict(module: VQAModule, batches: list[VQABatch], policy: PruningPolicy | None) -> list[str]:
    """Return the answers of `trainer.predict`, pruned by the callback a user adds; `policy` None: not pruned."""
    trainer = Trainer(**QUIET, callbacks=None if policy is None else TokenPruning(policy))
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is enough
    return [answer["answer"] for batch in trainer.predict(module, loader) or [] for answer in batch]


def scenes_split(
    folder: Path, split: Split, questions: int, seed: int, grids: Sequence[tuple[int, int]] = ((GRID, GRID),)
) -> VQASplit:
    """Write digit scenes into `folder/data/<split>` and return them as a split."""
    return VQASplit.of_scenes(write_scenes(folder / "data" / split, split, questions, seed, grids=grids))
