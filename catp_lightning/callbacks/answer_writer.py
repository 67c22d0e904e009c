"""`AnswerWriter`: writes the answers of `trainer.predict` to a file."""

import errno
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import RawIOBase
from numbers import Integral
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import CombinedLoader

from catp_lightning.callbacks.context import LoopContext, Stage
from catp_lightning.callbacks.signals import ended_by, tell
from catp_lightning.callbacks.strategies import on_all, on_first
from catp_lightning.utils.files import check_writable, explained, write_text
from catp_lightning.utils.locks import only_run, refuse_running

Place = tuple[int, ...]
"""Sort key of an answer: (data loader, index of the sample or batch, share of the data, number in the batch)."""
Answer = tuple[Place, dict[str, Any]]


class AnswerWriter(LoopContext, BasePredictionWriter):
    """Writes the answers of `trainer.predict` as JSON Lines in VQAv2's result layout, at the end of the run.

    A line is `{"question_id": 42, "answer": "yes"}`. Lines are in the order of the data set, and those of several
    loaders one loader after the other, whatever the sampler. Where Lightning does not know which samples a batch holds
    (an `IterableDataset`, a loader without batches), or a batch has another number of answers than samples, they are in
    the order of the batches: the first batch of each process, in the order of the processes, then the second of each.
    Characters at which Python ends a line, control characters, and halves of surrogate pairs are escaped as JSON
    escapes them; all others are written as they are, in UTF-8.

    During the run each process writes its answers, batch by batch, to a file of its own, `answers.rank0.jsonl` beside
    `answers.jsonl`. When all processes have finished, the first joins these files to the one file, which is the same
    for any number of processes, and they are deleted. A sample that several processes answered, to fill up their
    shares, is written once. The joined file is written whole or, when the run fails in any process or is killed, not at
    all; the answers up to then stay in the files of the processes: `merge_answers` joins them. The next run keeps them,
    as `answers.rank0.jsonl.before`, until it has finished.

    Args:
        path: the file to write; its folder is made if it does not exist. With several machines, it must be in a folder
            that they share.

    Raises:
        IsADirectoryError: at the start of a run: `path` is a folder.
        BlockingIOError: at the start of a run: another run is writing to `path`.
        OSError: at the start of a run, at a batch or at the end: `path` cannot be written.
        TypeError: at the first batch: the module's `predict_step` does not return a list of such dicts.
        FileNotFoundError: at the end, in all processes: the first process does not see the files of the others. They
            stay, each on its machine: bring them together and join them with `merge_answers`.
    """

    def __init__(self, path: str) -> None:
        super().__init__(("predict",))
        self.path = Path(path)
        self._answers: list[Answer] = []
        self._file: RawIOBase | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "predict":
            BasePredictionWriter.setup(self, trainer, pl_module, stage)
            on_all(trainer, lambda: self._prepare(trainer))  # at the start, not when all questions are answered

    def _prepare(self, trainer: Trainer) -> None:
        if self.path.is_dir():
            raise IsADirectoryError(f"{self.path} is a folder; AnswerWriter needs the name of a file in it.")
        if trainer.local_rank == 0:  # the first process of every machine: machines may not share the folder
            check_writable(self.path)
            refuse_running(self.path, BlockingIOError)
            for file in _rank_files(self.path):
                _keep(file)

    @contextmanager
    def loop_context(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> Iterator[None]:
        self._answers = []
        file = self._of_rank(trainer.global_rank)
        with only_run(self.path, trainer.global_rank, BlockingIOError):
            try:
                with open(file, "wb", buffering=0) as self._file:
                    yield
            finally:
                self._file = None
                if not self._answers:
                    file.unlink(missing_ok=True)

    def save_what_was_done(self, trainer: Trainer, error: BaseException) -> None:
        if self._answers and (file := self._of_rank(trainer.global_rank)).exists() and trainer.is_global_zero:
            tell(
                f"ended by {ended_by(error)}. The answers up to here, {len(self._answers)} of this process, are in "
                f"{str(file)!r}; catp_lightning.callbacks.answer_writer.merge_answers makes them a file of answers. "
                "The same command answers all questions again."
            )

    def _of_rank(self, rank: int) -> Path:
        return self.path.with_name(_rank_name(self.path, str(rank)))

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
        """Keep the batch's answers until the end of the run, in memory and in the file of this process."""
        answers = _checked(prediction, type(pl_module).__name__)
        indices = _whole_numbers(_indices(trainer, batch_idx, dataloader_idx))
        if indices and len(indices) == len(answers):
            places = [(dataloader_idx, index, 0, 0) for index in indices]
        else:  # under tensor parallelism processes that read the same data have the same `share`
            share = 1 + (trainer.distributed_sampler_kwargs or {}).get("rank", 0)
            places = [(dataloader_idx, (indices or [batch_idx])[0], share, n) for n in range(len(answers))]
        new = list(zip(places, answers, strict=True))
        self._answers += new
        self._append(_lines(new).encode(), self._of_rank(trainer.global_rank))

    def _append(self, content: bytes, path: Path) -> None:
        """Write to this process's file, unbuffered, so that the answers survive whatever happens to the process."""
        try:
            while self._file is not None and content:
                content = content[self._file.write(content) or 0 :]
        except OSError as error:
            raise explained(error, path) from error

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._file is None:
            return
        files = [self._of_rank(rank) for rank in range(trainer.world_size)]
        own = files[trainer.global_rank]
        if trainer.world_size == 1:
            write_text(self.path, _text(self._answers))
        else:
            on_all(trainer, lambda: write_text(own, _lines(self._answers)))
            on_first(trainer, lambda: self._merge(files))
        own.unlink(missing_ok=True)
        if trainer.local_rank == 0:
            for file in self.path.parent.glob("*"):
                if re.fullmatch(_rank_pattern(self.path) + r"\.before", file.name):
                    file.unlink(missing_ok=True)
        self._answers = []

    def take_part(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_predict_epoch_end(trainer, pl_module)

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

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_file": None, "_answers": []}


def merge_answers(files: Iterable[str | Path], path: str | Path) -> Path:
    """Join the files that the processes of one run wrote into the file that `AnswerWriter` would have written.

    An incomplete last line, which a run that was killed may leave, is left out.

    Args:
        files: the file of each process, in the order of the processes.
        path: the file to write.

    Returns:
        `path`.

    Raises:
        OSError: a file cannot be read, or `path` cannot be written.
        ValueError: a file was not written by a process of `AnswerWriter`, or is damaged.
    """
    answers: list[Answer] = []
    met: set[Place] = set()
    for file in files:
        with open(file, encoding="utf-8", newline="\n") as lines:
            own = [_parsed(line, file) for line in lines if line.endswith("\n")]
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


def _lines(answers: Iterable[Answer]) -> str:
    """Content of a process's file: answers as JSON Lines with their sort key under "order"."""
    return "".join(_line({"order": place, **answer}) for place, answer in answers)


def _line(fields: Mapping[str, Any]) -> str:
    """One JSON line that `str.splitlines` does not split, that UTF-8 can encode, and without control characters."""
    text = json.dumps(fields, ensure_ascii=False)
    return _UNPRINTED.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


_UNPRINTED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # JSON itself escapes those below the space


def _rank_name(path: Path, rank: str) -> str:
    return f"{path.stem}.rank{rank}{path.suffix}"


def _rank_pattern(path: Path) -> str:
    """Regular expression that matches the names of the processes' files beside `path`, for any number of processes."""
    return rf"{re.escape(path.stem)}\.rank\d+{re.escape(path.suffix)}"


def _rank_files(path: Path) -> list[Path]:
    """Existing files of processes beside `path`."""
    return [file for file in path.parent.glob("*") if re.fullmatch(_rank_pattern(path), file.name)]


def _keep(file: Path) -> None:
    """Put aside a process's file of a run that did not finish; of several such runs the longest file is kept."""
    kept = file.with_name(f"{file.name}.before")
    if kept.exists() and kept.stat().st_size > file.stat().st_size:
        file.unlink()
    else:
        file.replace(kept)


def _indices(trainer: Trainer, batch_idx: int, dataloader_idx: int) -> Sequence[Any]:
    """Indices of the samples in a batch, in the data set of its loader; empty where Lightning does not know them.

    The `batch_indices` that Lightning gives `write_on_batch_end` are not used: with several loaders they are those of
    the last loader that has any, and in a Trainer of `pytorch_lightning`, which collects indices only for writers of
    its own class, there are none.
    """
    loader = CombinedLoader(trainer.predict_dataloaders, "sequential").flattened[dataloader_idx]
    seen = getattr(getattr(loader, "batch_sampler", None), "seen_batch_indices", None)
    return seen[batch_idx] if seen else []


def _whole_numbers(indices: Sequence[Any]) -> list[int]:
    """Indices as ints; empty if the sampler gives anything else than integers."""
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
