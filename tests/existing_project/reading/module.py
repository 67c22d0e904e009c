"""The LightningModule."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from .model import WORDS, Reader


class MeanRank(Metric):
    """At which place the right answer stands among all words."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, logits: Tensor, answers: Tensor) -> None:
        right = logits.gather(1, answers[:, None])
        self.total += (logits > right).sum()
        self.count += len(answers)

    def compute(self) -> Tensor:
        return self.total / self.count


class ReadingModule(LightningModule):
    def __init__(self, rate: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Reader()
        self.accuracy = MulticlassAccuracy(num_classes=WORDS, average="micro")
        self.rank = MeanRank()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.net(batch["pixels"], batch["words"], batch["mask"])
        return logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch), batch["answer"])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._score("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._score("test", batch)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        return {"id": batch["id"], "words": self.net.say(batch["pixels"], batch["words"], batch["mask"])}

    def _score(self, stage: str, batch: dict[str, Tensor]) -> None:
        logits = self(batch)
        self.accuracy(logits, batch["answer"])
        self.rank(logits, batch["answer"])
        self.log_dict({f"{stage}/accuracy": self.accuracy, f"{stage}/rank": self.rank})
        self.log(f"{stage}/loss", cross_entropy(logits, batch["answer"]), batch_size=len(logits))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["rate"])
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}
