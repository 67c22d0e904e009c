"""Trainers that say nothing, and loaders for them."""

from collections.abc import Iterable, Iterator
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, IterableDataset

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
STAGES = ("validate", "test", "predict")


class Stream(IterableDataset[Any]):
    """Items of a loader that does not know its length, and is not divided among processes."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def trainer(*callbacks: Callback, **settings: Any) -> Trainer:
    return Trainer(callbacks=list(callbacks), **{**QUIET, **settings})


def loading(batches: Iterable[Any]) -> DataLoader[Any]:
    """A loader of batches that exist already."""
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
