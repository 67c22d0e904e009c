"""A calibration that was interrupted goes on where it was: its partial sums are in a file beside the policy."""

import glob
import hashlib
import json
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torchmetrics import Metric

from catp_lightning.errors import PolicyError
from catp_lightning.files import write_bytes

EVERY = 8  # batches between two savings: more often would cost more than it spares

ANEW = "or delete the file to start anew."


@dataclass
class _Saved:
    """A stage: what it was to do, how many batches are in its sums, and the sums."""

    task: str
    batches: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Partial:
    """The sums of one process, stage by stage, and a fingerprint of each batch that went into them.

    Sums are those before they are reduced over processes, so that one that was ahead takes part in every reduction
    once more, whatever the others still have to do. A process writes its own file and reads no other's. Where it cannot
    be written, a warning says so once, and nothing else changes: an older file is still of the same batches.

    Args:
        path: of the file, which need not exist.
        settings: what the sums depend on; JSON types.

    Raises:
        PolicyError: the file there was made with other settings, or cannot be read. It is left as it is.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))  # as they come back from a file
        self._stages: list[_Saved] = []
        self._stage = -1
        self._data: list[tuple[int, int]] = []
        self._changed = self._warned = False
        self._new_folder = not path.parent.exists()
        if path.is_file():
            self._load()

    def begin(self, task: str, metrics: Mapping[str, Metric]) -> int:
        """Go to the next stage and give its metrics what was saved of it: how many of its batches are in them.

        Args:
            task: all that the stage's sums depend on beside this process's data; sums for another are forgotten.
            metrics: of the stage, by name.

        Raises:
            PolicyError: the file's sums are not of these metrics' shapes.
        """
        self._stage += 1
        task = hashlib.sha256(task.encode()).hexdigest()
        if self._stage < len(self._stages) and self._stages[self._stage].task != task:
            del self._stages[self._stage :]
        if self._stage == len(self._stages):
            self._stages.append(_Saved(task))
        saved = self._stages[self._stage]
        if saved.batches:
            self._restore(saved.tensors, metrics)
        return saved.batches

    def has(self, number: int, marks: tuple[int, int]) -> bool:
        """Whether a batch of this stage is in the sums already.

        Args:
            number: of the batch.
            marks: its fingerprints, as `batch_fingerprints`.

        Raises:
            PolicyError: it is not the batch that had this number before, or the model answers it differently.
        """
        if number < len(self._data):
            before = self._data[number]
            if before[0] != marks[0]:
                raise PolicyError(self._other_batch(number, before[0], marks[0]))
            if before[1] != marks[1] and self._stage == 0:
                raise PolicyError(
                    f"{self.path} is part of a calibration with other answers: those to batch {number} had fingerprint "
                    f"{before[1]:016x}, now {marks[1]:016x}. Go on with the generation settings, and on the kind of "
                    f"device, it was begun with, {ANEW}"
                )
        return number < self._stages[self._stage].batches

    def add(self, marks: tuple[int, int], metrics: Mapping[str, Metric]) -> None:
        """Note that the next batch is in the sums; every few batches the file is written."""
        saved = self._stages[self._stage]
        if self._stage == 0:
            self._data.append(marks)
        saved.batches += 1
        self._changed = True
        if saved.batches % EVERY == 0:
            self._save(metrics)

    def finish(self, batches: int, metrics: Mapping[str, Metric]) -> None:
        """Write what the stage has found, before it is reduced.

        Args:
            batches: how many there were.
            metrics: of the stage.

        Raises:
            PolicyError: an interrupted run had more batches.
        """
        if batches < len(self._data):
            raise PolicyError(
                f"{self.path} is part of a calibration with more data: at least {len(self._data)} batches, now "
                f"{batches}. Go on with the data it was begun with, {ANEW}"
            )
        if self._changed:
            self._save(metrics)

    def delete(self) -> None:
        """Remove the file, and what a kill in the middle of writing it has left."""
        self.path.unlink(missing_ok=True)
        for left in self.path.parent.glob(f".{glob.escape(self.path.name)}.*.tmp"):
            left.unlink(missing_ok=True)
        if self._new_folder:
            with suppress(OSError):  # there is something in it, or it was never made
                self.path.parent.rmdir()

    def _save(self, metrics: Mapping[str, Metric]) -> None:
        """Whole or not at all."""
        self._stages[self._stage].tensors = {
            name: (torch.cat(value) if isinstance(value, list) else value).detach().cpu().contiguous()
            for name, value in _states(metrics).items()
            if not isinstance(value, list) or value
        }
        tensors = {
            f"{n}/{name}": value for n, saved in enumerate(self._stages) for name, value in saved.tensors.items()
        }
        tensors["data"] = torch.tensor(self._data, dtype=torch.int64, device="cpu").view(-1, 2)
        stages = [[saved.task, saved.batches] for saved in self._stages]
        metadata = {"settings": json.dumps(self.settings), "stages": json.dumps(stages)}
        try:
            write_bytes(self.path, save(tensors, metadata=metadata))
            self._changed = False
        except OSError as error:  # hours of work are not given up for a file that only spares them
            if not self._warned:
                warnings.warn(
                    f"This part of the calibration could not be saved ({error}). It goes on, and will try again; "
                    "interrupted before, it would start from what was saved last.",
                    stacklevel=2,
                )
            self._warned = True

    def _load(self) -> None:
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            old, stages = json.loads(metadata["settings"]), json.loads(metadata["stages"])
            if not isinstance(old, dict):
                raise ValueError("settings should be a dictionary")
            self._data = [(key, answers) for key, answers in tensors.pop("data").long().tolist()]
            self._stages = [_Saved(str(task), int(batches)) for task, batches in stages]
            for name, value in tensors.items():
                stage, _, state = name.partition("/")
                self._stages[int(stage)].tensors[state] = value
        except (OSError, SafetensorError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
            raise PolicyError(
                f"{self.path} cannot be read as part of a calibration ({type(error).__name__}: {error!s:.200}). Delete "
                "it to start anew."
            ) from error
        differing = [
            f"{name} was {old.get(name)!s:.200}, is {self.settings.get(name)}"
            for name in sorted({*old, *self.settings})
            if old.get(name) != self.settings.get(name)
        ]
        if differing:
            raise PolicyError(
                f"{self.path} is part of another calibration: {'; '.join(differing)}. Go on with what it was begun "
                f"with, {ANEW}"
            )

    def _restore(self, tensors: Mapping[str, Tensor], metrics: Mapping[str, Metric]) -> None:
        for name, value in _states(metrics).items():
            saved = tensors.get(name)
            if isinstance(value, list):
                found = saved is None or not value or saved.shape[1:] == value[0].shape[1:]
            else:
                found = saved is not None and (saved.shape, saved.dtype) == (value.shape, value.dtype)
            if not found:
                raise PolicyError(
                    f"{self.path} was made by another version: its {name} is "
                    f"{None if saved is None else tuple(saved.shape)}. Delete it to start anew."
                )
            if saved is not None:
                metric, _, state = name.rpartition("/")
                saved = saved.to(metrics[metric].device)
                setattr(metrics[metric], state, [saved] if isinstance(value, list) else saved)

    def _other_batch(self, number: int, before: int, now: int) -> str:
        changed = f"batch {number} had fingerprint {before:016x}, now {now:016x}"
        if self._stage:
            return (
                f"The calibration data changed between two readings: {changed}. Calibration reads its split several "
                f"times and in one order: switch shuffling and random augmentation off, and delete {self.path}."
            )
        elsewhere = [place for place, (key, _) in enumerate(self._data) if key == now]
        order = f", which was batch {elsewhere[0]}: the order changed" if elsewhere else ""
        return (
            f"{self.path} is part of a calibration with other data: {changed}{order}. Go on with the data it was begun "
            f"with, in the same batches and without shuffling, {ANEW}"
        )


def _states(metrics: Mapping[str, Metric]) -> dict[str, Tensor | list[Tensor]]:
    """The states of several metrics, by the metric's name and their own."""
    return {
        f"{name}/{state}": value for name, metric in metrics.items() for state, value in metric.metric_state.items()
    }
