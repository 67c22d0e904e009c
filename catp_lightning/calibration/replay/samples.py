"""Batches of recorded samples."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from catp_lightning.calibration.replay.base import Replay
from catp_lightning.calibration.replay.groups import Groups
from catp_lightning.methods.observation import Observation, Signal
from catp_lightning.methods.selection import sample_of_images
from catp_lightning.utils.hashing import mix


@dataclass(frozen=True)
class Samples:
    """Batch of B recorded samples with I images.

    Attributes:
        replay: prompts of the samples and the unpruned answers.
        seen: signals of the images.
        images: int64 [B], fingerprint of each sample's first image; 0 for a sample without images.
        inside: signals observed inside the language model, as one image per sample; None if there are none.
        groups: groups of the samples, by a field of the user's batch; None if they have none.
    """

    replay: Replay
    seen: Observation
    images: Tensor

    inside: Observation | None = None
    groups: Groups | None = None

    @classmethod
    def of(
        cls, replay: Replay, seen: Observation, inside: Observation | None = None, groups: Groups | None = None
    ) -> "Samples":
        of_images, images = sample_of_images(seen.valid, replay.tokens), seen[Signal.IMAGE_HASH]
        first = torch.zeros(len(replay.tokens), dtype=torch.int64, device=images.device)
        # Backwards, so that of several images of a sample the first is written last.
        for image in reversed(range(len(images))):
            first[of_images[image]] = images[image]
        own = None if groups is None else groups.each(lambda keys: keys.to(first.device))
        return cls(replay, seen, first, inside, own)

    def where(self, chosen: Tensor) -> "Samples":
        """Return the samples where `chosen`, bool [B], is True."""
        return Samples(
            self.replay.of_samples(chosen),
            self.seen.of_images(chosen[sample_of_images(self.seen.valid, self.visual)]),
            self.images[chosen],
            None if self.inside is None else self.inside.of_images(chosen),
            None if self.groups is None else self.groups.where(chosen),
        )

    def each(self, change: Callable[[Tensor], Tensor]) -> "Samples":
        """Return the samples with `change` applied to every tensor, always in one order."""
        return Samples(
            self.replay.each(change),
            self.seen.each(change),
            change(self.images),
            None if self.inside is None else self.inside.each(change),
            None if self.groups is None else self.groups.each(change),
        )

    def of_images(self, values: Tensor) -> Tensor:
        """Return the value of each sample's first image, 0 for a sample without images: [I, ...] -> [B, ...]."""
        found = values.new_zeros(len(self.images), *values.shape[1:])
        samples = sample_of_images(self.seen.valid, self.visual)
        found[samples.flip(0)] = values.flip(0)  # backwards, so that a sample's first image is written last
        return found

    @property
    def visual(self) -> Tensor:
        """Visual tokens of each sample: bool [B, T]."""
        return self.replay.tokens

    @property
    def keys(self) -> Tensor:
        """Checksum of each sample's first image and question: int64 [B]."""
        return mix(self.images ^ self.replay.questions)

    @property
    def group_keys(self) -> Tensor:
        """Checksum of the name of each sample's group: int64 [B]; 0 without groups."""
        return torch.zeros_like(self.images) if self.groups is None else self.groups.keys

    @property
    def key(self) -> int:
        """Checksum of all images, questions and groups, independent of their order."""
        together = self.keys.sum() + mix(self.seen[Signal.IMAGE_HASH]).sum()
        if self.groups is not None:
            together += mix(self.keys ^ self.groups.keys).sum()
        return int(together)
