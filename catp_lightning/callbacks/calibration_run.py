"""One calibration in a predict loop: its passes, and how the split is read for each."""

import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Trainer
from tqdm import tqdm

from catp_lightning.calibration.checkpoint import CalibrationCheckpoint
from catp_lightning.calibration.identity import batch_fingerprints
from catp_lightning.calibration.passes import Pass
from catp_lightning.calibration.replay.groups import Groups
from catp_lightning.calibration.replay.recorder import Recorder
from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.calibration.report.result import CalibrationResult
from catp_lightning.calibration.search.promise import Promise
from catp_lightning.callbacks.loaders import Amount
from catp_lightning.callbacks.signals import end_if_told
from catp_lightning.callbacks.steps import StepFunction, batches_again
from catp_lightning.errors import PolicyError, PruningError
from catp_lightning.utils.progress import Lines, batch_of, shows_bars


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
        step: the strategy's `predict_step`, recorded by `recorder`.
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
    step: StepFunction = field(init=False)
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
        """Measure one batch: replay the model calls of the step that just ran, under the same precision."""
        self.lines.now = f"{self.now.title}, {batch_of(number + 1, trainer.num_predict_batches)}"
        recorded, precision = self.recorder.recorded(self.groups), trainer.precision_plugin.predict_step_context()
        with recorded as found, torch.no_grad(), precision:
            batch = [Samples.of(*one) for one in found]
            batch_hashes = batch_fingerprints(batch)
            if self.partial.has(number, batch_hashes):
                return
            if number == 0 and self.promise is not None:
                self.amount.check(sum(len(samples.images) for samples in batch), self.promise, self.promised)
            for samples in batch:
                self.now.see(samples)
            self.partial.add(batch_hashes, self.now.metrics)

    def finish(self) -> bool:
        """End a pass, after saving its sums, so that it need not be repeated; return True if it was the last."""
        self.partial.finish(self.batches, self.now.metrics)
        try:
            self.now = next(self.passes)
        except StopIteration as end:
            self.found = end.value
        except PolicyError:  # too few images: a run with more of them is another calibration
            self.partial.delete()
            raise
        return self.found is not None

    def read_again(self, trainer: Trainer, done: int) -> None:
        """Run the user's step again on every batch that is not in the sums of this pass, and measure it.

        Raises:
            PruningError: the loader gives another number of batches than in the loop.
        """
        if done == self.batches:
            return
        hidden = is_hidden(trainer) or not shows_bars()
        batches = tqdm(batches_again(trainer), total=self.batches, desc="catp", disable=hidden)
        seen = 0
        for number, arguments in enumerate(batches):
            seen += 1
            end_if_told()
            if number >= done:
                self.read_groups(arguments[0])
                self.step(*arguments)
                self.read_batch(trainer, number)
        if seen != self.batches:
            self.partial.forget()
            raise PruningError(
                f"The calibration loader gave {self.batches} batches at first and {seen} when asked again. Calibration "
                "reads its split several times: give a DataLoader over a data set, not an iterator that ends."
            )


def is_hidden(trainer: Trainer) -> bool:
    """True if this process shows no progress: progress bars are off, or it is not the first process."""
    return trainer.progress_bar_callback is None or not trainer.is_global_zero
