"""Modules and Trainers of the package `pytorch_lightning`."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.support.models import SHORT, random_blip2
from tests.support.trainers import QUIET

pytorch_lightning = pytest.importorskip("pytorch_lightning")


class Answering(pytorch_lightning.LightningModule):  # type: ignore[misc, name-defined]
    """A module of a user who has never imported `lightning`."""

    def __init__(self, brings: Sequence[Any] = ()) -> None:
        super().__init__()
        self.net, _ = random_blip2()
        self.net.language_projection.weight.data *= 0.05
        self.seen: list[torch.Tensor] = []
        self.brings = list(brings)

    def configure_callbacks(self) -> list[Any]:
        return self.brings

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(**batch).logits.pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.net(**batch).logits
        self.seen.append(logits)
        self.log("level", logits.abs().mean(), batch_size=len(logits))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net.generate(**batch, **SHORT)


def trainer(*callbacks: Any, **settings: Any) -> Any:
    return pytorch_lightning.Trainer(callbacks=list(callbacks), **{**QUIET, **settings})


class Naming(pytorch_lightning.LightningModule):  # type: ignore[misc, name-defined]
    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> list[dict[str, Any]]:
        return [{"question_id": number, "answer": f"answer {number}"} for number in batch.tolist()]
