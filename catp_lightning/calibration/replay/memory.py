"""Recorded batches in main memory: later passes read them there, and the user's step need not run again."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from catp_lightning.calibration.replay.samples import Samples

LIMIT = 2**31
"""Bytes of recorded batches that one process holds at most, 2 GiB."""

RecordedBatch = Sequence[tuple[Samples, Sequence[Samples]]]
"""One batch: the samples of each call of the model, and these samples on perturbed images, once a perturbation."""


@dataclass(frozen=True)
class _Held:
    batch: RecordedBatch
    devices: Sequence[torch.device]  # of its tensors, in the order of `Samples.each`


class Memory:
    """Batches of one process, if all of them together stay below `LIMIT`; otherwise it is empty and stays so.

    Args:
        expected: number of batches that this process will read; infinity if it is not known.
    """

    def __init__(self, expected: float) -> None:
        self._expected, self._bytes, self._full = expected, 0, False
        self._held: list[_Held] = []

    def add(self, number: int, batch: RecordedBatch) -> None:
        """Hold a copy of a batch if it is the next one, and if all batches would fit at the mean size so far."""
        if self._full or number != len(self._held):
            return
        self._bytes += _bytes(batch)
        read = number + 1
        batches = self._expected if self._expected < math.inf else read
        if self._bytes * max(batches, read) / read > LIMIT:
            self._full = True
            self._held.clear()
            return
        devices: list[torch.device] = []

        def out(value: Tensor) -> Tensor:
            devices.append(value.device)
            return value.to("cpu", copy=True)  # not a view into a larger tensor, which would be held as a whole

        self._held.append(
            _Held([(one.each(out), [copy.each(out) for copy in copies]) for one, copies in batch], devices)
        )

    def has_all(self, batches: int) -> bool:
        """Return True if it holds this number of batches."""
        return len(self._held) == batches

    def batch(self, number: int) -> RecordedBatch:
        """Return a batch, each of its tensors on the device on which it was recorded."""
        held = self._held[number]
        devices = iter(held.devices)

        def back(value: Tensor) -> Tensor:
            return value.to(next(devices))

        return [(one.each(back), [copy.each(back) for copy in copies]) for one, copies in held.batch]


def _bytes(batch: RecordedBatch) -> int:
    """Return the size of all tensors of a batch."""
    sizes: list[int] = []

    def counted(value: Tensor) -> Tensor:
        sizes.append(value.nbytes)
        return value

    for one, copies in batch:
        for samples in (one, *copies):
            samples.each(counted)
    return sum(sizes)
