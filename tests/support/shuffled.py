"""Data that comes in another order each time."""

from typing import Any

from catp_lightning.data.vqa import VQADataModule
from tests.support.trainers import loading


class Shuffled(VQADataModule):
    """Gives the samples that are predicted in their order and backwards in turn."""

    turn = 0

    def predict_dataloader(self) -> Any:
        loader = super().predict_dataloader()
        Shuffled.turn += 1
        return loading(list(loader)[:: -1 if Shuffled.turn % 2 else 1])
