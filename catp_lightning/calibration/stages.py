"""Stages of a calibration: each reads the split once and adds up its findings in metrics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torchmetrics import Metric

from catp_lightning.calibration.importance import Columns, head_votes, probe, sizes
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay import Replay
from catp_lightning.calibration.sets import pair_rows, protected_tokens
from catp_lightning.calibration.split import fold_of
from catp_lightning.calibration.statistics import (
    ImageSet,
    PartCounts,
    ProbeSums,
    RankCorrelation,
    TokenCounts,
)
from catp_lightning.choosing import images_to_samples
from catp_lightning.fingerprint import mix
from catp_lightning.observation import Observation, Signal
from catp_lightning.selectors import without_autocast

PAIRS = 40
"""Limit on the slots up to which pairs are fitted too: the sums grow with the fourth power of their number."""


@dataclass(frozen=True)
class Samples:
    """Batch of B recorded samples with I images.

    Attributes:
        replay: prompts of the samples and the unpruned answers.
        seen: signals of the images.
        images: int64 [B], fingerprint of each sample's first image; 0 for a sample without images.
        inside: signals observed inside the language model, as one image per sample; None if there are none.
    """

    replay: Replay
    seen: Observation
    images: Tensor

    inside: Observation | None = None

    @classmethod
    def of(cls, replay: Replay, seen: Observation, inside: Observation | None = None) -> "Samples":
        of_images, images = _sample_of_images(replay.tokens, seen), seen[Signal.IMAGE_HASH]
        first = torch.zeros(len(replay.tokens), dtype=torch.int64, device=images.device)
        # Backwards, so that of several images of a sample the first is written last.
        for image in reversed(range(len(images))):
            first[of_images[image]] = images[image]
        return cls(replay, seen, first, inside)

    def where(self, chosen: Tensor) -> "Samples":
        """Return the samples where `chosen`, bool [B], is True."""
        return Samples(
            self.replay.of_samples(chosen),
            self.seen.of_images(chosen[_sample_of_images(self.visual, self.seen)]),
            self.images[chosen],
            None if self.inside is None else self.inside.of_images(chosen),
        )

    @property
    def visual(self) -> Tensor:
        """Visual tokens of each sample: bool [B, T]."""
        return self.replay.tokens

    @property
    def keys(self) -> Tensor:
        """Checksum of each sample's first image and question: int64 [B]."""
        return mix(self.images ^ self.replay.questions)

    @property
    def key(self) -> int:
        """Checksum of all images and questions, independent of their order."""
        together = self.keys.sum() + mix(self.seen[Signal.IMAGE_HASH]).sum()
        return int(together)


def _sample_of_images(visual: Tensor, seen: Observation) -> Tensor:
    """Return the index of the sample that each image belongs to: int64 [I]."""
    ends = visual.sum(1).cumsum(0)
    return torch.bucketize(seen.valid.sum(1).cumsum(0) - 1, ends, right=True)


Belongs = Callable[[Tensor], Tensor]
"""Function that selects the samples of a stage by the fingerprint of their image: int64 [B] -> bool [B]."""


class Stage(Protocol):
    """Protocol of a stage, which adds up metrics during one reading of the split."""

    title: str

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """Metrics of the stage, by name."""

    def see(self, samples: Samples) -> None:
        """Add a batch to the metrics."""


class Probing:
    """Stage that probes the learning part by random subsets, and notes image fingerprints and rank correlations."""

    title = "measuring what each visual token is worth"

    def __init__(
        self, plan: Plan, budgets: Sequence[int | float], part_of: Belongs, device: torch.device | None
    ) -> None:
        self.plan, self.columns, self.part_of = plan, Columns.of(plan), part_of
        self.sizes = sizes(budgets, plan.family.tokens_per_image) if self.columns.total else []
        self.sums = ProbeSums(self.columns.total).to(device)
        self.images, self.parts = ImageSet().to(device), PartCounts().to(device)
        self.tokens, self.unsound = TokenCounts().to(device), ImageSet().to(device)
        nothing = torch.empty(0, dtype=torch.int64, device=device)  # a process may have no batch
        self.images.update(nothing)
        self.unsound.update(nothing)
        self.metrics: dict[str, Metric] = {
            "probes": self.sums,
            "images": self.images,
            "parts": self.parts,
            "tokens": self.tokens,
            "unsound": self.unsound,
        }
        self.correlations = {
            name: RankCorrelation(len(layers)).to(device) for name, (layers, _) in self.columns.voters.items()
        }
        self.metrics |= {f"correlation of {name}": metric for name, metric in self.correlations.items()}
        self.pairs: ProbeSums | None = None
        slots = self.columns.slots
        if 0 < slots <= PAIRS:
            self.metrics["pairs"] = self.pairs = ProbeSums(slots * (slots + 1) // 2).to(device)

    def see(self, samples: Samples) -> None:
        # One NaN would make all sums NaN, and nothing can be learnt where the model itself gives no finite answer.
        sound = samples.replay.sound()
        self.unsound.update(samples.keys[~sound])
        if sound.any():
            self._measure(samples if bool(sound.all()) else samples.where(sound))

    def _measure(self, samples: Samples) -> None:
        part = self.part_of(samples.images)
        self.parts.update(part)
        self.images.update(samples.seen[Signal.IMAGE_HASH])
        self.tokens.update(samples.seen.droppable.sum(1))
        voted_on = samples.seen if samples.inside is None else samples.inside
        whole = voted_on.droppable.all(1)  # padding or protected tokens would shift an image's ranks
        with without_autocast(part):
            for name, metric in self.correlations.items():
                metric.update(self.plan.voters[name].votes(voted_on).sum(2)[whole])
        if (part == 0).any():
            self._probe(samples.where(part == 0))

    def _probe(self, samples: Samples) -> None:
        seen = samples.seen if samples.inside is None else samples.inside
        votes = head_votes(self.plan.voters.values(), seen, samples.visual)
        fold, owner = fold_of(samples.images), None
        stay = protected_tokens(samples.seen, samples.visual) if samples.inside is None else None
        stay = stay if stay is not None and bool(stay.any()) else None
        if self.plan.family.reads == "cross-attention":  # the text must see at least one row of each image
            valid = samples.seen.valid
            images = torch.arange(len(valid), device=valid.device)[:, None].expand(valid.shape)
            owner = images_to_samples(images, valid, samples.visual, 0)
        for number, size in enumerate(self.sizes):
            found = probe(samples.replay, votes, samples.images, size, number, self.columns.slots, owner, stay)
            self.sums.update(fold, found.rows, found.gain)
            if self.pairs is not None:
                self.pairs.update(fold, pair_rows(found.slots), found.gain)
