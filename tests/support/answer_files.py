"""Modules that return answers, and files of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from catp_lightning.callbacks.answer_writer import AnswerWriter
from tests.support.trainers import trainer


class Returning(LightningModule):
    """Answers with what it is given, or with what `make` makes of a question id."""

    def __init__(self, make: Callable[[list[int]], Any]) -> None:
        super().__init__()
        self.make = make

    def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.make(batch.tolist())


def named(ids: list[int]) -> list[dict[str, Any]]:
    """An answer for each question id."""
    return [{"question_id": number, "answer": f"número {number}"} for number in ids]


def write_answers(
    path: Path, make: Callable[[list[int]], Any] = named, questions: int = 5, **options: Any
) -> list[Any] | None:
    """Predict in one process, two questions a batch, with the answers in a file."""
    run = trainer(AnswerWriter(str(path)), **{"devices": 1, **options})
    return run.predict(Returning(make), DataLoader(torch.arange(questions), batch_size=2), return_predictions=False)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def many_answers(folder: Path, which: int) -> None:
    """A hundred answers, or one more, fifty a batch."""
    run = trainer(AnswerWriter(str(folder / "answers.jsonl")), devices=1)
    run.predict(Returning(named), DataLoader(torch.arange(100 + which), batch_size=50))
