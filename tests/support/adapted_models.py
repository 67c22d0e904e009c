"""Checks of models that are not as they were built."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from catp_lightning import CrossAttentionCalibration, PruningPolicy, prune
from tests.support import models
from tests.support.calibrations import data
from tests.support.models import GREEDY, SHORT
from tests.support.modules import Generating
from tests.support.oracles import columns_kept, hooked
from tests.support.policies import HALF
from tests.support.trainers import loading, trainer


class Holder(Generating):
    """Trains, and validates by a forward."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.net(**batch, labels=batch["input_ids"]).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validated = self.net(**batch).logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([weight for weight in self.parameters() if weight.requires_grad], lr=1e-2)


def pruned(module: Any, inputs: dict[str, Tensor], policy: PruningPolicy = HALF) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, generated tokens, and what was kept."""
    with torch.no_grad(), prune(module, policy) as pruning:
        logits, tokens = module(**inputs).logits, module.generate(**inputs, **GREEDY)
    assert pruning.keep is not None
    return logits, tokens, pruning.keep


def assert_alike(one: tuple[Tensor, ...], other: tuple[Tensor, ...], relative: float = 1e-5) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=0.0, atol=relative * other[0].abs().max().item())
    assert all(map(torch.equal, one[1:], other[1:]))


def check_dropping_equals_masking(model: Any, inputs: dict[str, Tensor]) -> None:
    """On a BLIP-2 as it is: with its adapters, or its rounded weights."""
    logits, tokens, keep = pruned(model, inputs)
    layers = list(model.get_submodule("language_model.model.decoder.layers"))
    names = {"input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == models.IMAGE, 110)}  # the oracles' id
    gone = ~columns_kept(names, keep)

    def hide(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        mask = kwargs["attention_mask"]
        hidden = torch.zeros(len(gone), mask.shape[-1], dtype=torch.bool)
        hidden[:, : gone.shape[1]] = gone
        own = torch.arange(mask.shape[-1] - mask.shape[-2], mask.shape[-1])[:, None] == torch.arange(mask.shape[-1])
        seen = mask if mask.dtype == torch.bool else mask == 0
        return {"attention_mask": seen & ~(hidden[:, None, None] & ~own)}

    with torch.no_grad():
        full = model(**inputs).logits
        with hooked(layers, hide):
            masked, masked_tokens = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    rows, scale = ~gone & inputs["attention_mask"].bool(), full.abs().max().item()
    assert (full[rows] - masked[rows]).abs().max() > 0.1 * scale, "dropping must move logits, or this proves nothing"
    assert (logits[rows] - masked[rows]).abs().max() < 2e-5 * scale
    assert torch.equal(tokens, masked_tokens)


def check_calibrates(model: nn.Module, path: Path) -> None:
    module, batches = Holder(model), data(16, 8)
    callback = CrossAttentionCalibration(path / "policy.json", keep=0.5, scorer="catp")
    with torch.no_grad():
        expected = [module.net.generate(**batch, **SHORT) for batch in batches]
    predicted = trainer(callback).predict(module, loading(batches))
    assert all(map(torch.equal, predicted, expected))
    with torch.no_grad(), prune(module, callback.policies[0]) as pruning:
        module.net(**batches[0])
    assert pruning.keep.sum(1).tolist() == [4] * 8
