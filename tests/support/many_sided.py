"""A user's module that uses much of Lightning."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from catp_lightning.policy import PruningPolicy
from catp_lightning.pruning import prune
from tests.support.models import TINY, random_blip2
from tests.support.trainers import loading


class Marks(Callback):
    """What a module brings with configure_callbacks."""


class ManySided(LightningModule):
    """A user's module that uses much of Lightning: hyperparameters, metrics, hooks, callbacks."""

    def __init__(self, model: str = "random", policy: str = "none", rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model, self.inputs = random_blip2(shape=TINY)
        self.model.vision_model.requires_grad_(False)
        self.level = MeanMetric()
        self.batches, self.seen, self.calls = 2, [], Counter[str]()

    def loader(self) -> DataLoader[dict[str, torch.Tensor]]:
        one = {name: value[:1] for name, value in self.inputs.items()}
        return loading([self.inputs, one][: self.batches])

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model(**batch).logits

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams["rate"])
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}

    def configure_callbacks(self) -> list[Callback]:
        return [Marks()]

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        logits = self(batch)
        self.seen.append(logits.detach())
        self.log("train_level", logits.detach().abs().mean(), batch_size=1)
        return logits.float().pow(2).mean()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        logits = self(batch)
        self.seen.append(logits)
        self.level(logits.abs().mean())
        self.log("val_level", self.level, batch_size=1)

    def test_step(self, batch: dict[str, torch.Tensor]) -> None:  # without batch_idx, as Lightning allows
        self.seen.append(self(batch))

    def on_validation_epoch_end(self) -> None:
        self.log("val_batches", float(len(self.seen)))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 7

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.calls[f"loaded {checkpoint['mine']}"] += 1

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Without the vision tower, as modules with frozen parts do."""
        return {key: value for key, value in super().state_dict(*args, **kwargs).items() if "vision_model" not in key}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict({**super().state_dict(), **state_dict}, strict=strict, assign=assign)


class Predicting(ManySided):
    """With a predict_step of its own, decorated and without batch_idx."""

    @staticmethod
    def _doubled(step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def doubled(self: Any, *args: Any) -> Any:
            return 2 * step(self, *args)

        return doubled

    @_doubled
    def predict_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self(batch)


def logits(module: ManySided, policy: PruningPolicy | None = None) -> list[torch.Tensor]:
    module.model.eval()
    with torch.no_grad():
        if policy is None:
            return [module.model(**batch).logits for batch in module.loader()]
        with prune(module.model, policy):
            return [module.model(**batch).logits for batch in module.loader()]
