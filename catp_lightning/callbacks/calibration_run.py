"""One calibration in a predict loop: its passes, and how the split is read for each."""

import gc
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from tqdm import tqdm

from catp_lightning.calibration.checkpoint import CalibrationCheckpoint
from catp_lightning.calibration.identity import batch_fingerprints
from catp_lightning.calibration.passes import Pass
from catp_lightning.calibration.replay.groups import Groups
from catp_lightning.calibration.replay.memory import Memory, RecordedBatch
from catp_lightning.calibration.replay.recorder import Recorder
from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.calibration.report.result import CalibrationResult
from catp_lightning.calibration.search.promise import Promise
from catp_lightning.calibration.sums import bytes_of
from catp_lightning.callbacks.loaders import Amount
from catp_lightning.callbacks.signals import end_if_told, ended_by, tell
from catp_lightning.callbacks.steps import StepFunction, batches_again
from catp_lightning.errors import PolicyError, PruningError
from catp_lightning.methods.observation import Signal
from catp_lightning.utils.progress import Lines, Pace, batch_of, shows_bars

LARGE = 2**20
"""Bytes of a pass's sums above which they are removed as soon as the next pass begins, which takes some 0.2 seconds."""


@dataclass
class CalibrationRun:
    """Calibration that runs in one predict loop.

    Attributes:
        passes: the calibration; each pass over the split is taken from it when the one before has been read.
        now: the pass that is read.
        recorder: records the model calls of the user's step.
        partial: the sums on disk, from which an interrupted run goes on.
        amount: amount of data in the loaders.
        promise: promise that the chosen budget has to keep; None: none.
        promised: share of the images that a promise is tested on.
        lines: progress lines.
        memory: the batches read so far, if they fit.
        pace: how long the pass will still take.
        step: the strategy's `predict_step`, recorded by `recorder`.
        unrecorded: the same, recorded by nobody.
        keys: checksums of the samples of each batch, int64 [B], in the order of the loop.
        groups: groups of the current batch's samples; None if the promise names no field for them.
        batches: number of batches of the loop so far.
        replaying: seconds spent on measuring during the loop, beside the user's own prediction.
        started: time of the loop's start, as `time.monotonic` gives it.
        found: what was measured, once the last pass has been read.
    """

    passes: Generator[Pass, None, CalibrationResult]
    now: Pass
    recorder: Recorder
    partial: CalibrationCheckpoint
    amount: Amount
    promise: Promise | None
    promised: float
    lines: Lines
    memory: Memory
    pace: Pace = field(default_factory=Pace, kw_only=True)
    step: StepFunction = field(init=False)
    unrecorded: StepFunction = field(init=False)
    keys: list[Tensor] = field(default_factory=list, kw_only=True)
    groups: Groups | None = None
    batches: int = 0
    replaying: float = 0.0  # seconds
    started: float = field(default_factory=time.monotonic)
    found: CalibrationResult | None = None

    def begin(self) -> int:
        """Take over the sums of an interrupted run for this pass; return the number of batches in them."""
        return self.partial.begin(self.now.key, self.now.metrics)

    def read_groups(self, batch: Any) -> None:
        """Read the groups of a batch's samples, before the user's step, which may take the field out of the batch."""
        field = None if self.promise is None else self.promise.group_by
        self.groups = None if field is None else Groups.of(batch, field)

    def read_batch(self, trainer: Trainer, number: int) -> None:
        """Measure one batch: replay the model calls of the step that just ran, under the same precision.

        With perturbations the step runs again for each, on the same batch; nothing is measured before all have run.

        Raises:
            PolicyError: a perturbation fails, or returns something else than pixels.
            PruningError: the step sent other prompts when it ran again.
        """
        with self._measuring(trainer, number), self.recorder.recorded(self.groups) as found:
            batch = [Samples.of(*one) for one in found]
            batch_hashes = batch_fingerprints(batch)
            if number == len(self.keys):
                none = torch.empty(0, dtype=torch.int64, device="cpu")
                self.keys.append(torch.cat([none, *(one.keys.cpu() for one in batch)]))
            if self.partial.has(number, batch_hashes):
                return
            if number == 0 and self.promise is not None:
                self.amount.check(sum(len(samples.images) for samples in batch), self.promise, self.promised)
            names = self.recorder.plan.perturbations if batch else ()
            copies = [self._perturbed(name, batch) for name in names]
            self.recorder.again = None  # a batch is not held longer than it is needed
            recorded = [(samples, own) for samples, *own in zip(batch, *copies, strict=True)]
            self.memory.add(number, recorded)
            self.measure(recorded, batch_hashes)

    def measure(self, recorded: RecordedBatch, batch_hashes: tuple[int, int]) -> None:
        """Give a batch with these fingerprints to the pass, and note that it is in the sums."""
        for samples, copies in recorded:
            self.now.see(samples, copies)
        self.partial.add(batch_hashes, self.now.metrics)

    @contextmanager
    def _measuring(self, trainer: Trainer, number: int) -> Iterator[None]:
        """Context in which a batch is measured: without gradients, under the precision of the user's step."""
        title, counts = self.now.title, trainer.num_predict_batches
        self.lines.now = f"{title}, {batch_of(number + 1, counts)}{self.pace.left(title, number, counts)}"
        with torch.no_grad(), trainer.precision_plugin.predict_step_context():
            yield

    def _perturbed(self, name: str, batch: list[Samples]) -> list[Samples]:
        """Run the user's step again on perturbed images; return its samples, one by one those of the `batch`."""
        assert self.recorder.again is not None  # there are perturbations
        args, kwargs = self.recorder.again
        with self.recorder.perturber.perturbing(name):
            self.step(*args, **kwargs)
        with self.recorder.recorded() as found:
            copies = [Samples.of(*one) for one in found]
        if list(map(_identities, copies)) != list(map(_identities, batch)):
            raise PruningError(
                "The step sent other prompts or images to the model when it ran again on the same batch, so answers to "
                f"images perturbed by {name!r:.200} cannot be told whose they are. Make predict_step do the same each "
                "time, and change no tensor of its batch; or calibrate without augment=."
            )
        return copies

    def finish(self) -> bool:
        """End a pass, after saving its sums, so that it need not be repeated; return True if it was the last."""
        self.partial.finish(self.batches, self.now.metrics)
        large = bytes_of(self.now.metrics) > LARGE
        try:
            self.now = next(self.passes)
        except StopIteration as end:
            self.found = end.value
        except PolicyError:  # too few images: a run with more of them is another calibration
            self.partial.delete()
            raise
        if large:
            gc.collect()  # metrics refer to themselves, so that their sums would stay
        return self.found is not None

    def read_again(self, trainer: Trainer, done: int) -> None:
        """Measure every batch that is not in the sums of this pass.

        If all batches are in memory they are taken from there; if not, the user's step runs again on each.

        Raises:
            PruningError: the loader gives another number of batches than in the loop.
        """
        if done == self.batches:
            return
        hidden = is_hidden(trainer) or not shows_bars()
        held = self.memory.has_all(self.batches)
        batches: Iterable[Any] = range(self.batches) if held else batches_again(trainer)
        seen = 0
        for number, arguments in enumerate(tqdm(batches, total=self.batches, desc="catp", disable=hidden)):
            seen += 1
            end_if_told()
            if number >= done and held:
                with self._measuring(trainer, number):
                    recorded = self.memory.batch(number)
                    self.measure(recorded, batch_fingerprints([samples for samples, _ in recorded]))
            elif number >= done:
                self.read_groups(arguments[0])
                self.step(*arguments)
                self.read_batch(trainer, number)
        if seen != self.batches:
            self.partial.forget()
            raise PruningError(
                f"The calibration loader gave {self.batches} batches at first and {seen} when asked again. Calibration "
                "reads its split several times: give a DataLoader over a data set, not an iterator that ends."
            )

    def save(self, error: BaseException, telling: bool) -> None:
        """Save the sums of a run that `error` ended; `telling`: say on standard error how far it has come."""
        if isinstance(error, Exception):  # the batch that failed may fail again: go on from the last saved sums
            return
        saved = self.partial.flush()
        if not telling:
            return
        if saved:
            tell(
                f"ended by {ended_by(error)}. What was measured is saved in {str(self.partial.path)!r}, up to batch "
                f"{self.partial.batches} of '{self.now.title}': the same command goes on from there."
            )
        elif not self.partial.batches:
            tell(f"ended by {ended_by(error)}, before a batch was measured: the same command goes on from the start.")


def _identities(samples: Samples) -> list[list[int]]:
    """Return the checksums of the samples' first images and questions, and of all their images, in their order."""
    return [samples.keys.tolist(), samples.seen[Signal.IMAGE_HASH].tolist()]


def is_hidden(trainer: Trainer) -> bool:
    """True if this process shows no progress: progress bars are off, or it is not the first process."""
    return trainer.progress_bar_callback is None or not trainer.is_global_zero
