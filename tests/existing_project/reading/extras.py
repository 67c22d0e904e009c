"""A logger and callbacks of the project's own."""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only


class LineLogger(Logger):
    """One JSON object a line."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    @property
    def name(self) -> str:
        return "lines"

    @property
    def version(self) -> int:
        return 0

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self._write({"hyperparameters": params if isinstance(params, dict) else vars(params)})

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int) -> None:  # as Lightning's own example
        self._write({"step": step, **metrics})

    def _write(self, line: dict[str, Any]) -> None:
        with self.file.open("a") as lines:
            lines.write(json.dumps(line) + "\n")


class WordWriter(BasePredictionWriter):
    """What was said, as a file of tensors."""

    def __init__(self, file: Path) -> None:
        super().__init__(write_interval="epoch")
        self.file = file

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        torch.save({"predictions": list(predictions), "indices": list(batch_indices)}, self.file)


class Logits(Callback):
    """Keeps what the module answered in its tests, by a hook of its own on a part of the model."""

    def __init__(self) -> None:
        self.logits: list[torch.Tensor] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.handle = pl_module.net.register_forward_hook(  # type: ignore[union-attr]
            lambda module, args, output: self.logits.append(output.clone())
        )

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.handle.remove()
