"""Guard: another method takes the place of a policy's for samples with an image unlike those of its calibration."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from catp_lightning.methods.method import Method
from catp_lightning.methods.observation import Needs, Observation, Signal, join
from catp_lightning.methods.routing import select_each
from catp_lightning.methods.selection import Selection, sample_of_images
from catp_lightning.methods.summary import Ranges, summary
from catp_lightning.utils.on_cpu import on_cpu, on_device


@dataclass(frozen=True)
class Summaries:
    """Summaries of I images, and which of their S numbers are far outside of the calibration's.

    Attributes:
        numbers: float [I, S], as from `summary`.
        outside: bool [I, S].
    """

    numbers: Tensor
    outside: Tensor


@dataclass(frozen=True)
class Guard:
    """Watch over the images of a policy.

    Attributes:
        ranges: what the policy's calibration saw.
        fallback: method for samples with an image far outside; None: the policy's own.
    """

    ranges: Ranges
    fallback: Method | None = None

    @property
    def needs(self) -> Needs:
        """Signals to observe beside the policy's own."""
        watched: Needs = {Signal.IMAGE_FEATURES: None}
        return watched if self.fallback is None else join([watched, self.fallback.needs])

    def summaries(self, seen: Observation) -> Summaries:
        """Return the summaries of images; `seen` has their `Signal.IMAGE_FEATURES`."""
        numbers = summary(seen)
        return Summaries(numbers, self.ranges.outside(numbers, seen.droppable.sum(1)))

    def select(
        self, method: Method, found: Summaries, seen: Observation, keep: int | float, visual: Tensor
    ) -> Selection:
        """Return the visual tokens that stay, as `Method.select`.

        Args:
            method: the policy's own.
            found: summaries of the images.
            seen: signals of the images that either method needs.
            keep: the budget of either.
            visual: bool [B, T], the visual tokens that each sample has.
        """
        if self.fallback is None:
            return method.select(seen, keep, visual)
        far = on_cpu(found.outside.any(1))[0]
        if not bool(far.any()):
            return method.select(seen, keep, visual)
        return select_each(self._taken(method, self.fallback, far, seen, visual), keep, visual)

    @staticmethod
    def _taken(
        method: Method, fallback: Method, far: Tensor, seen: Observation, visual: Tensor
    ) -> Iterator[tuple[Method, Tensor, Observation]]:
        samples, own = on_cpu(sample_of_images(seen.valid, visual), visual)
        falls = torch.zeros(len(own), dtype=torch.bool, device="cpu")
        falls[samples[far]] = True
        for rule, here in ((method, ~falls), (fallback, falls)):
            if own[here].any():
                yield rule, on_device(here, visual.device), seen.of_images(on_device(here[samples], visual.device))
