"""A user's module in several processes, its samples, and what a run finds in each."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from catp_lightning.callbacks.token_pruning import TokenPruning
from catp_lightning.modules.pruned import PrunedModule
from catp_lightning.policy import PruningPolicy
from catp_lightning.policy.images import encode_images
from catp_lightning.utils.hashing import fingerprint
from tests.support.models import faint_blip2, greedily, random_inputs
from tests.support.processes import Ended, in_fork, ranks
from tests.support.trainers import QUIET

Sample = dict[str, Tensor]
Found = dict[str, Any]


def samples(count: int) -> list[Sample]:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        all_of_them = {**random_inputs(8, 24, True, torch.float64), "number": torch.arange(24)}
    return [{name: value[row] for name, value in all_of_them.items()} for row in range(count)]


class Remembering(LightningModule):
    """A user's module that remembers what it answered, sample by sample, in this process."""

    def __init__(self) -> None:
        super().__init__()
        self.net = faint_blip2(0.02, dtype=torch.float64)
        self.answers: list[tuple[int, list[int]]] = []
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def _answer(self, batch: Sample) -> Tensor:
        numbers = batch.pop("number")
        answers = self.net.generate(**batch, **greedily(2, 1))
        self.answers += zip(numbers.tolist(), answers.tolist(), strict=True)
        return answers

    def _lines(self, numbers: Tensor, answers: Tensor) -> list[dict[str, Any]]:
        pairs = zip(numbers.tolist(), answers.tolist(), strict=True)
        return [{"question_id": number, "answer": str(answer)} for number, answer in pairs]

    def validation_step(self, batch: Sample, batch_idx: int) -> None:
        answers = self._answer(batch)
        self.log("length", (answers != 1).double().sum(1).mean(), batch_size=len(answers), sync_dist=True)

    def test_step(self, batch: Sample, batch_idx: int) -> None:
        self._answer(batch)

    def predict_step(self, batch: Sample, batch_idx: int) -> list[dict[str, Any]]:
        return self._lines(batch["number"], self._answer(batch))


SEEN = fingerprint(torch.stack([sample["pixel_values"] for sample in samples(12)[2:12]]))
POLICY = PruningPolicy(scorer="catp", keep=0.75, evidence={"images": encode_images(SEEN)})


def loader(count: int) -> DataLoader[Sample]:
    return DataLoader(samples(count), batch_size=2)  # type: ignore[arg-type]


def evaluate(stage: str, data: Any, wrapped: bool = False, **options: Any) -> Found:
    """One run as a user writes it, and what it found in this process."""
    module, pruning = Remembering(), TokenPruning(POLICY, compare=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = Trainer(callbacks=[] if wrapped else [pruning], **{**QUIET, **options})
        getattr(trainer, stage)(PrunedModule(module, POLICY) if wrapped else module, data)
    told = [str(warning.message).split(" images")[0] for warning in caught]
    return {
        "answers": sorted(module.answers),
        "figures": pruning.figures,
        "logged": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "overlap": [text for text in told if text.startswith("This split contains")],
        "unsynchronised": [text for text in told if "recommended to use `self.log" in text and "catp" in text],
    }


def each(folder: Path, work: Callable[[int], Any], processes: int) -> list[Any]:
    """What `work` finds in each of several processes."""

    def saved(rank: int) -> None:
        torch.save(work(rank), folder / f"{rank}.pt")

    check(in_fork(*ranks(saved, processes)))
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


def check(ended: Sequence[Ended]) -> None:
    for one in ended:
        assert one.code == 0, one.said[-4000:]
        assert not one.left, one.said[-4000:]


def close(found: dict[str, float], expected: dict[str, float]) -> bool:
    return found == pytest.approx(expected, rel=1e-6)


class Trained(Remembering):
    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        batch.pop("number")
        return self.net(**batch).logits.pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Failing(Remembering):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def _answer(self, batch: Sample) -> Tensor:
        if self.global_rank == self.rank and min(batch["number"]) >= 4:
            raise ValueError(f"process {self.rank} cannot read this image")
        return super()._answer(batch)
