"""Modules of users in loops of one and several loaders."""

from typing import Any

import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from tests.support.models import TINY, random_blip2
from tests.support.modules import Answering
from tests.support.trainers import trainer


class Still(Answering):
    """Its weights stay what they are while it is trained, so that every epoch answers alike."""

    batch_size = 1  # of `samples`, for the Tuner

    def __init__(self) -> None:
        super().__init__(random_blip2(shape=TINY))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def samples(self) -> DataLoader[Any]:
        one = {name: value[0] for name, value in self.inputs.items()}
        return DataLoader([one] * 4, batch_size=self.batch_size)  # type: ignore[arg-type]


class Several(Still):
    """For several loaders."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # type: ignore[override]
        super().validation_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # type: ignore[override]
        super().test_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:  # type: ignore[override]
        return super().predict_step(batch, batch_idx)


def answers(module: Answering, stage: str, *callbacks: Callback, loaders: Any = None, **settings: Any) -> Any:
    returned = getattr(trainer(*callbacks, **settings), stage)(module, loaders or module.loader())
    return returned if stage == "predict" else module.seen
