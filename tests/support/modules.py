"""Modules of users: nothing of ours is in them."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from catp_lightning import PruningPolicy, prune
from tests.support.models import IMAGE, SHORT, faint_blip2, random_blip2
from tests.support.policies import HALF
from tests.support.trainers import loading

Batch = dict[str, Tensor]


class Generating(L.LightningModule):
    """A user's module that generates in prediction.

    Args:
        net: the model; by default a random BLIP-2 of which some answers survive pruning.
        settings: those of its generate.
    """

    def __init__(self, net: nn.Module | None = None, settings: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.net: Any = faint_blip2() if net is None else net
        self.settings = SHORT if settings is None else settings

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> Tensor:
        return self.net.generate(**batch, **self.settings)


class Forwarding(Generating):
    """A user's module whose prediction is the logits of its model."""

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> Tensor:
        return self.net(**batch).logits


class Answering(L.LightningModule):
    """A user's module whose every step is a forward of its model; `seen` keeps the logits.

    Args:
        made: its model, and a batch; by default a random BLIP-2's.
    """

    def __init__(self, made: tuple[nn.Module, Batch] | None = None) -> None:
        super().__init__()
        self.model: Any
        self.model, self.inputs = random_blip2() if made is None else made
        self.seen: list[Tensor] = []

    def loader(self, batches: int = 2) -> DataLoader[Batch]:
        one = {name: value[:1] for name, value in self.inputs.items()}
        return loading([self.inputs, one][:batches])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self.model(**batch).logits
        self.seen.append(logits.detach())
        return logits.float().pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self.model(**batch).logits
        self.seen.append(logits)
        self.log("val_level", logits.abs().mean(), batch_size=len(logits))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.seen.append(self.model(**batch).logits)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.model(**batch).logits


def by_hand(module: Answering, policy: PruningPolicy = HALF) -> list[Tensor]:
    """Logits of its batches, pruned without a Trainer."""
    with torch.no_grad(), prune(module.model.eval(), policy):
        return [module.model(**batch).logits for batch in module.loader()]


def unpruned(module: Answering) -> list[Tensor]:
    """Logits of its batches, without anything of ours."""
    with torch.no_grad():
        return [module.model.eval()(**batch).logits for batch in module.loader()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def two_images(inputs: Batch) -> Batch:
    """The first sample with its image twice: twice the visual tokens."""
    visual = inputs["input_ids"][:1] == IMAGE
    ids, mask = (inputs[name][:1] for name in ("input_ids", "attention_mask"))
    return {
        "input_ids": torch.cat([ids[visual][None], ids], 1),
        "attention_mask": torch.cat([mask[visual][None], mask], 1),
        "pixel_values": inputs["pixel_values"][[0, 0]],
    }
