"""Answers of a prediction run as a file."""

import errno
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import CombinedLoader

from catp_lightning.callbacks.strategies import loop_was_skipped, on_all, on_first
from catp_lightning.files import check_writable, write_text

Place = tuple[int, ...]
"""Where an answer belongs: what is compared in turn."""
Answer = tuple[Place, dict[str, Any]]


class AnswerWriter(BasePredictionWriter):
    """Writes the answers of `trainer.predict` as JSON Lines in VQAv2's result layout, when the run has come to its end.

    A line is `{"question_id": 42, "answer": "yes"}`, in the order of the data set, and of several loaders one after the
    other, whatever the sampler. Where Lightning does not know which samples a batch holds (an `IterableDataset`, a
    loader without batches), and with as many answers as it likes, in the order of the batches: each process's first,
    in the order of the processes, then each one's second.

    Of several processes each writes what it answered to a file of its own, `answers.rank0.jsonl` beside
    `answers.jsonl`, and when all have come to the end the first of them joins these to the one file, the same that one
    process writes, and they are deleted. A sample that several processes answered, to fill up their shares, is written
    once. The file is written whole or, when the run fails in any process, not at all; rank files that such a run left
    are deleted when the next one starts.

    Args:
        path: the file to write; its folder is made where it does not exist. With several machines, in a folder that
            they share.

    Raises:
        IsADirectoryError: at the start of a run, where `path` is a folder.
        OSError: at the start of a run, where `path` cannot be written; at the end, where it cannot be any more.
        TypeError: at the first batch, where the module's `predict_step` returns anything but a list of such dicts.
        FileNotFoundError: at the end, in all processes, where the first does not see the files of the others. They
            stay, each on its machine: bring them together and join them with `merge_answers`.
    """

    def __init__(self, path: str) -> None:
        super().__init__(write_interval="batch")  # keeps only what is written, and objects at the first wrong batch
        self.path = Path(path)
        self._answers: list[Answer] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._answers = []
        if stage == "predict":
            on_all(trainer, lambda: self._prepare(trainer))  # now, not when all questions are answered

    def _prepare(self, trainer: Trainer) -> None:
        if self.path.is_dir():
            raise IsADirectoryError(f"{self.path} is a folder; AnswerWriter needs the name of a file in it.")
        if trainer.local_rank == 0:  # of every machine: they may not share the folder
            check_writable(self.path)
            for file in _rank_files(self.path) if trainer.world_size > 1 else ():
                file.unlink(missing_ok=True)

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
        answers = _checked(prediction, type(pl_module).__name__)
        indices = _whole_numbers(_indices(trainer, batch_idx, dataloader_idx))
        if indices and len(indices) == len(answers):
            places = [(dataloader_idx, index, 0, 0) for index in indices]
        else:  # under tensor parallelism several processes read the same data, and have the same number here
            share = 1 + (trainer.distributed_sampler_kwargs or {}).get("rank", 0)
            places = [(dataloader_idx, (indices or [batch_idx])[0], share, n) for n in range(len(answers))]
        self._answers += zip(places, answers, strict=True)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size == 1:
            write_text(self.path, _text(self._answers))
            return
        files = [self.path.with_name(_rank_name(self.path, str(rank))) for rank in range(trainer.world_size)]
        own = files[trainer.global_rank]
        text = "".join(_line({"order": place, **answer}) for place, answer in self._answers)
        on_all(trainer, lambda: write_text(own, text))
        on_first(trainer, lambda: self._merge(files))
        own.unlink()

    def _merge(self, files: Sequence[Path]) -> None:
        if missing := [str(rank) for rank, file in enumerate(files) if not file.exists()]:
            message = (
                f"the answers of {len(missing)} of {len(files)} processes (rank {', '.join(missing)}) are not here: "
                "their machines do not share this folder. Nothing was joined, and every process's answers stay where "
                "it wrote them. Give AnswerWriter a path that all machines share; or bring the files together and "
                f"call catp_lightning.callbacks.answer_writer.merge_answers(files, {str(self.path)!r})"
            )
            raise FileNotFoundError(errno.ENOENT, message, str(files[int(missing[0])]))
        merge_answers(files, self.path)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if stage == "predict" and loop_was_skipped(trainer, stage):
            self.on_predict_epoch_end(trainer, pl_module)


def merge_answers(files: Iterable[str | Path], path: str | Path) -> Path:
    """Join the files that the processes of one run wrote to the one that `AnswerWriter` would have written.

    Args:
        files: one a process, in the order of the processes.
        path: the file to write.

    Raises:
        OSError: a file cannot be read, or `path` cannot be written.
        ValueError: a file is none that `AnswerWriter` wrote, or is damaged.
    """
    answers: list[Answer] = []
    met: set[Place] = set()
    for file in files:
        with open(file, encoding="utf-8") as lines:
            own = [_parsed(line, file) for line in lines]
        answers += [(place, answer) for place, answer in own if place not in met]
        met.update(place for place, _ in own)
    return write_text(path, _text(answers))


def _parsed(line: str, file: str | Path) -> Answer:
    try:
        fields = json.loads(line)
        return tuple(fields.pop("order")), fields
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} holds {line!r:.80}, but every line of a file that a process of AnswerWriter wrote has an 'order'."
        ) from error


def _text(answers: Iterable[Answer]) -> str:
    return "".join(_line(answer) for _, answer in sorted(answers, key=lambda answer: answer[0]))


def _line(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False) + "\n"


def _rank_name(path: Path, rank: str) -> str:
    return f"{path.stem}.rank{rank}{path.suffix}"


def _rank_files(path: Path) -> list[Path]:
    """The files of processes that are beside `path`, of however many."""
    name = re.compile(re.escape(_rank_name(path, "RANK")).replace("RANK", r"\d+"))
    return [file for file in path.parent.glob("*") if name.fullmatch(file.name)]


def _indices(trainer: Trainer, batch_idx: int, dataloader_idx: int) -> Sequence[Any]:
    """Which samples of its loader a batch holds; none where Lightning does not know.

    What it hands to `write_on_batch_end` is of the last loader that told, and nothing in a Trainer of
    `pytorch_lightning`, which collects indices for writers of its own class alone.
    """
    loader = CombinedLoader(trainer.predict_dataloaders, "sequential").flattened[dataloader_idx]
    seen = getattr(getattr(loader, "batch_sampler", None), "seen_batch_indices", None)
    return seen[batch_idx] if seen else []


def _whole_numbers(indices: Sequence[Any]) -> list[int]:
    """The indices; none where a sampler gives something else."""
    known = all(isinstance(index, Integral) for index in indices)
    return [int(index) for index in indices] if known else []


def _checked(prediction: Any, module: str) -> list[dict[str, Any]]:
    if not isinstance(prediction, list):
        raise TypeError(f"{_EXPECTED.format(module)}, but it returned {type(prediction).__name__}. {_HELP}")
    answers = []
    for item in prediction:
        fields = item if isinstance(item, Mapping) else {}
        question_id, answer = fields.get("question_id"), fields.get("answer")
        if not isinstance(question_id, int) or isinstance(question_id, bool) or not isinstance(answer, str):
            raise TypeError(f"{_EXPECTED.format(module)}, but one of them is {item!r:.120}. {_HELP}")
        answers.append({"question_id": question_id, "answer": answer})
    return answers


_EXPECTED = "AnswerWriter needs {}.predict_step to return a list of {{'question_id': int, 'answer': str}}"
_HELP = "VQAModule does; otherwise return such a list, or remove the callback."
