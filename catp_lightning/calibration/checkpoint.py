"""Resume an interrupted calibration from its partial sums, which are saved in a file beside the policy."""

import glob
import hashlib
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torchmetrics import Metric

from catp_lightning.calibration.sums import copied, states
from catp_lightning.errors import PolicyError
from catp_lightning.utils.files import read_bytes, write_bytes
from catp_lightning.utils.messages import warn

EVERY = 8  # batches between two writes: writing more often would cost more than it saves

LARGEST = 2**32
"""Limit on the bytes of a file of partial sums, 4 GiB: many times what the sums of the largest models take."""

ANEW = "or delete the file to start anew."


@dataclass
class _Saved:
    """Saved state of a stage: a hash of its task, the number of batches in its sums, and the sums by name."""

    task: str
    batches: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)


class CalibrationCheckpoint:
    """Checkpoint of one process's sums, stage by stage, with fingerprints of each batch that went into them.

    Sums are saved before they are reduced over processes, so that a process that was ahead takes part in every
    reduction again, whatever the others still have to do. A process writes its own file and reads no other's. If it
    cannot be written, there is one warning and nothing else changes: an older file still holds sums of the same
    batches.

    Args:
        path: path of the file, which need not exist.
        settings: settings that the sums depend on; JSON types.

    Attributes:
        begun: True if there was no file, so that the calibration was begun here.

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
        self._started, self._spent = time.monotonic(), 0.0
        self.begun = not os.path.lexists(path)
        if not self.begun:
            self._load()

    @property
    def seconds(self) -> float:
        """Seconds spent up to now by all runs that went on from this file, as far as they could save them."""
        return self._spent + time.monotonic() - self._started

    @property
    def batches(self) -> int:
        """Number of batches of the current stage that are in the sums."""
        return self._stages[self._stage].batches if self._stage >= 0 else 0

    def begin(self, task: str, metrics: Mapping[str, Metric]) -> int:
        """Go to the next stage, restore its metrics from its saved sums, and return the number of batches in them.

        Args:
            task: everything that the stage's sums depend on except this process's data; saved sums of another task,
                and of the stages after it, are discarded.
            metrics: metrics of the stage, by name.

        Raises:
            PolicyError: the file's sums do not have the shapes of these metrics.
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

    def has(self, number: int, batch_hashes: tuple[int, int]) -> bool:
        """Return True if a batch of this stage is in the sums already.

        Args:
            number: index of the batch.
            batch_hashes: fingerprints of the batch, from `batch_fingerprints`.

        Raises:
            PolicyError: it is not the batch that had this number before, or, in the first stage, the model answers it
                differently.
        """
        if number < len(self._data):
            before = self._data[number]
            if before[0] != batch_hashes[0]:
                if self._stage:
                    self.forget()
                raise PolicyError(self._other_batch(number, before[0], batch_hashes[0]))
            if before[1] != batch_hashes[1] and self._stage == 0:
                raise PolicyError(
                    f"{self.path} is part of a calibration with other answers: those to batch {number} had fingerprint "
                    f"{before[1]:016x}, now {batch_hashes[1]:016x}. Go on with the generation settings, and on the "
                    f"kind of device, it was begun with, {ANEW}"
                )
        return number < self._stages[self._stage].batches

    def add(self, batch_hashes: tuple[int, int], metrics: Mapping[str, Metric]) -> None:
        """Record that the next batch is in the sums; every `EVERY` batches the file is written.

        The sums are copied, so that an interrupt in the next batch finds sums of whole batches, whatever was added.
        """
        if self._stage == 0:
            self._data.append(batch_hashes)
        before = self._stages[self._stage]
        self._changed = True
        # In one step, so that an interrupt finds a batch in the sums and in the count, or in neither.
        self._stages[self._stage] = _Saved(before.task, before.batches + 1, copied(metrics))
        if (before.batches + 1) % EVERY == 0:
            self._write()

    def finish(self, batches: int, metrics: Mapping[str, Metric]) -> None:
        """Write the sums of a completed stage, before they are reduced over processes.

        Args:
            batches: number of batches of the stage.
            metrics: metrics of the stage, by name.

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

    def flush(self) -> bool:
        """Write all whole batches since the last write; return True if there is a complete file to resume from."""
        if self._changed:
            self._write()
        return self.path.is_file() and not self._changed

    def forget(self) -> None:
        """Remove the file if it was begun here; an older run's file is kept: it holds hours of work on its own data."""
        self._changed = False
        if self.begun:
            self.delete()

    def delete(self) -> None:
        """Remove the file, and temporary files that a kill in the middle of writing has left."""
        self.path.unlink(missing_ok=True)
        for left in self.path.parent.glob(f".{glob.escape(self.path.name)}.*.tmp"):
            left.unlink(missing_ok=True)
        self._changed = False

    def _save(self, metrics: Mapping[str, Metric]) -> None:
        self._stages[self._stage].tensors = copied(metrics)
        self._write()

    def _write(self) -> None:
        """Write the file, whole or not at all; if that fails, warn once and go on."""
        tensors = {
            f"{n}/{name}": value for n, saved in enumerate(self._stages) for name, value in saved.tensors.items()
        }
        data = self._data[: self._stages[0].batches]  # without a batch whose `add` was interrupted
        tensors["data"] = torch.tensor(data, dtype=torch.int64, device="cpu").view(-1, 2)
        stages = [[saved.task, saved.batches] for saved in self._stages]
        metadata = {"settings": json.dumps(self.settings), "stages": json.dumps(stages)}
        metadata["seconds"] = repr(self.seconds)
        metadata["checksum"] = _checksum(tensors, metadata)
        try:
            write_bytes(self.path, save(tensors, metadata=metadata))
            self._changed = False
        except OSError as error:  # hours of work are not given up for a file that only spares them
            if not self._warned:
                warn(
                    f"This part of the calibration could not be saved ({error}). It goes on, and will try again; "
                    "interrupted before, it would start from what was saved last.",
                    stacklevel=2,
                )
            self._warned = True

    def _load(self) -> None:
        try:
            content = read_bytes(self.path, LARGEST)
            metadata, tensors = _metadata(content), load(content)
            if metadata.pop("checksum") != _checksum(tensors, metadata):
                raise ValueError("its checksum is another: the file was damaged or changed")
            old, stages = json.loads(metadata["settings"]), json.loads(metadata["stages"])
            if not isinstance(old, dict):
                raise ValueError("settings should be a dictionary")
            self._data = [(key, answers) for key, answers in tensors.pop("data").long().tolist()]
            self._stages = [_Saved(str(task), int(batches)) for task, batches in stages]
            self._spent = float(metadata.get("seconds", 0))  # older files lack it
            if not 0 <= self._spent < math.inf:
                raise ValueError(f"seconds is {self._spent}")
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
        for name, value in states(metrics).items():
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
                saved = saved.to(metrics[metric].device, copy=True)  # a copy, which the metric adds to
                setattr(metrics[metric], state, [saved] if isinstance(value, list) else saved)

    def _if_older(self) -> str:
        return "" if self.begun else f", and delete {self.path} to start anew"

    def _other_batch(self, number: int, before: int, now: int) -> str:
        changed = f"batch {number} had fingerprint {before:016x}, now {now:016x}"
        if self._stage:
            return (
                f"The calibration data changed between two readings: {changed}. Calibration reads its split several "
                f"times and in one order: switch shuffling and random augmentation off{self._if_older()}."
            )
        elsewhere = [place for place, (key, _) in enumerate(self._data) if key == now]
        order = f", which was batch {elsewhere[0]}: the order changed" if elsewhere else ""
        return (
            f"{self.path} is part of a calibration with other data: {changed}{order}. Go on with the data it was begun "
            f"with, in the same batches and without shuffling, {ANEW}"
        )


def _metadata(content: bytes) -> dict[str, str]:
    """Return the metadata in a safetensors file's header: eight bytes for its length, then JSON."""
    length = int.from_bytes(content[:8], "little")
    return dict(json.loads(content[8 : 8 + length])["__metadata__"])


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return a checksum of every name, dtype, shape and bit: any change could give another policy."""
    found = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        value = tensors[name]
        found.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        found.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
