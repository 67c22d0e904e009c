"""Answers of a prediction run as a file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from catp_lightning.files import write_text


class AnswerWriter(BasePredictionWriter):
    """Writes the answers of `trainer.predict` as JSON Lines in VQAv2's result layout, when the run has come to its end.

    A line is `{"question_id": 42, "answer": "yes"}`, in the order of the questions. With several processes, each writes
    the questions it answered to a file of its own, `answers.rank0.jsonl` beside `answers.jsonl`; no question is in two.
    The file is written whole or, when the run fails, not at all.

    Args:
        path: the file to write; its folder is made where it does not exist.

    Raises:
        IsADirectoryError: at the start of a run, where `path` is a folder.
        TypeError: at the first batch, where the module's `predict_step` returns anything but a list of such dicts.
    """

    def __init__(self, path: str) -> None:
        super().__init__(write_interval="batch")  # keeps only what is written, and objects at the first wrong batch
        self.path = Path(path)
        self._lines: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.path.is_dir():
            raise IsADirectoryError(f"{self.path} is a folder; AnswerWriter needs the name of a file in it.")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._lines = []

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keeps the batch's answers until the run has come to its end."""
        self._lines += _lines(prediction, type(pl_module).__name__)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = self.path
        if trainer.world_size > 1:
            path = path.with_name(f"{path.stem}.rank{trainer.global_rank}{path.suffix}")
        write_text(path, "".join(self._lines))


def _lines(prediction: Any, module: str) -> list[str]:
    if not isinstance(prediction, list):
        raise TypeError(f"{_EXPECTED.format(module)}, but it returned {type(prediction).__name__}. {_HELP}")
    lines = []
    for item in prediction:
        fields = item if isinstance(item, Mapping) else {}
        question_id, answer = fields.get("question_id"), fields.get("answer")
        if not isinstance(question_id, int) or isinstance(question_id, bool) or not isinstance(answer, str):
            raise TypeError(f"{_EXPECTED.format(module)}, but one of them is {item!r:.120}. {_HELP}")
        lines.append(json.dumps({"question_id": question_id, "answer": answer}, ensure_ascii=False) + "\n")
    return lines


_EXPECTED = "AnswerWriter needs {}.predict_step to return a list of {{'question_id': int, 'answer': str}}"
_HELP = "VQAModule does; otherwise return such a list, or remove the callback."
