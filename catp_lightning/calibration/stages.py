"""The stages of a calibration: each reads the split once, and adds up what it finds in metrics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torchmetrics import Metric

from catp_lightning.calibration.candidates import Candidate
from catp_lightning.calibration.importance import VOTERS, WORST, Columns, head_votes, probe, sizes
from catp_lightning.calibration.replay import Replay
from catp_lightning.calibration.sets import method_ranks, methods, pair_rows
from catp_lightning.calibration.split import fold_of
from catp_lightning.calibration.statistics import (
    CandidateSums,
    FirstQuestions,
    ImageSet,
    PartCounts,
    ProbeSums,
    RankCorrelation,
)
from catp_lightning.counts import keep_count
from catp_lightning.dropping import visual_tokens
from catp_lightning.families import Family
from catp_lightning.fingerprint import mix
from catp_lightning.observation import Observation, Signal
from catp_lightning.selectors import without_autocast

PAIRS = 40
"""Slots whose pairs are learned too, at most: the sums grow with the fourth power of their number."""


@dataclass(frozen=True)
class Samples:
    """A batch of B samples with I images.

    Attributes:
        replay: their prompts and the unpruned answers.
        seen: the signals of their images.
        images: int64 [B], the fingerprint of each sample's first image; 0 for a sample without one.
    """

    replay: Replay
    seen: Observation
    images: Tensor

    @classmethod
    def of(cls, replay: Replay, seen: Observation) -> "Samples":
        counts = replay.visual.sum(1) // seen.tokens
        images = seen[Signal.FINGERPRINT]
        first = (counts.cumsum(0) - counts).clamp(max=len(images) - 1)
        return cls(replay, seen, torch.where(counts > 0, images[first], 0))

    def where(self, chosen: Tensor) -> "Samples":
        """Some of them: bool [B]."""
        counts = self.replay.visual.sum(1) // self.seen.tokens
        return Samples(
            self.replay.of_samples(chosen),
            self.seen.of_images(chosen.repeat_interleave(counts)),
            self.images[chosen],
        )

    @property
    def visual(self) -> Tensor:
        """Which visual tokens each sample has: bool [B, T]."""
        return visual_tokens(self.replay.visual)

    @property
    def key(self) -> int:
        """A checksum of all images and questions, whatever their order."""
        together = mix(self.images ^ self.replay.questions).sum() + mix(self.seen[Signal.FINGERPRINT]).sum()
        return int(together)


Belongs = Callable[[Tensor], Tensor]
"""Which samples a stage is for, by the fingerprint of their image: int64 [B] -> bool [B]."""


class Stage(Protocol):
    """What is added up during one reading of the split."""

    title: str

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """What it adds up to, by name."""

    def see(self, samples: Samples) -> None:
        """Add a batch."""


class Probing:
    """Random subsets of the learning part; every image's fingerprint; how alike the layers rank tokens."""

    title = "measuring what each visual token is worth"

    def __init__(
        self, family: Family, budgets: Sequence[int | float], part_of: Belongs, device: torch.device | None
    ) -> None:
        self.columns, self.tokens, self.part_of = Columns.of(family), family.tokens_per_image, part_of
        self.sizes = sizes(budgets, self.tokens)
        self.sums = ProbeSums(self.columns.total).to(device)
        self.images, self.parts = ImageSet().to(device), PartCounts().to(device)
        self.images.update(torch.empty(0, dtype=torch.int64, device=device))  # a process may have no batch
        self.metrics: dict[str, Metric] = {"probes": self.sums, "images": self.images, "parts": self.parts}
        self.correlations = {name: RankCorrelation(self.columns.layers).to(device) for name in VOTERS}
        self.metrics |= {f"correlation of {name}": metric for name, metric in self.correlations.items()}
        self.pairs: ProbeSums | None = None
        if self.tokens <= PAIRS:
            self.metrics["pairs"] = self.pairs = ProbeSums(self.tokens * (self.tokens + 1) // 2).to(device)

    def see(self, samples: Samples) -> None:
        part = self.part_of(samples.images)
        self.parts.update(part)
        self.images.update(samples.seen[Signal.FINGERPRINT])
        with without_autocast(part):
            for name, metric in self.correlations.items():
                metric.update(VOTERS[name].votes(samples.seen).sum(2))
        if (part == 0).any():
            self._probe(samples.where(part == 0))

    def _probe(self, samples: Samples) -> None:
        votes, fold = head_votes(samples.seen, samples.visual), fold_of(samples.images)
        for number, size in enumerate(self.sizes):
            found = probe(samples.replay, votes, samples.images, size / self.tokens, number)
            self.sums.update(fold, found.rows, found.gain)
            if self.pairs is not None:
                self.pairs.update(fold, pair_rows(found.slots), found.gain)


class Competition:
    """Candidates answer the samples of one round, or of the checking part.

    Args:
        title: what people are told.
        candidates: by fold: what is fitted was fitted without the fold it is measured on. Or one list for all folds.
        budgets: at each of which some candidates compete.
        alive: their numbers, for each budget.
        belongs: which samples this is for.
        device: where the sums are kept.
    """

    def __init__(
        self,
        title: str,
        candidates: Sequence[Sequence[Candidate]],
        budgets: Sequence[int | float],
        alive: Sequence[Sequence[int]],
        belongs: Belongs,
        device: torch.device | None,
    ) -> None:
        self.title, self.budgets, self.alive, self.belongs = title, budgets, alive, belongs
        self.running = sorted(set().union(*alive))
        first = [candidates[0][number] for number in self.running]
        rules = [candidate.policy(1.0) for candidate in first]
        self.rules = [
            [
                rule if of_fold[number] == same else of_fold[number].policy(1.0)
                for number, same, rule in zip(self.running, first, rules, strict=True)
            ]
            for of_fold in candidates
        ]
        places = range(len(rules))
        self._shared = [n for n in places if all(of_fold[n] is rules[n] for of_fold in self.rules)]
        self._own = sorted(set(places) - set(self._shared))
        self._of_all = methods([rules[n] for n in self._shared])
        self._of_fold = [methods([of_fold[n] for n in self._own]) for of_fold in self.rules]
        self.sums = CandidateSums(len(budgets), len(candidates[0])).to(device)
        self.metrics: dict[str, Metric] = {"candidates": self.sums}

    def see(self, samples: Samples) -> None:
        chosen = self.belongs(samples.images)
        if chosen.any():
            self.compare(samples.where(chosen))

    def compare(self, samples: Samples) -> list[Tensor]:
        """Whether each candidate's answer is the unpruned one: bool [N, B] for each budget, N alive there."""
        counts = [keep_count(keep, samples.seen.tokens) for keep in self.budgets]
        ranks = self._ranks(samples, max(counts))
        keep = [
            ranks[[self.running.index(number) for number in alive]] < count
            for count, alive in zip(counts, self.alive, strict=True)
        ]
        found = samples.replay.compare_each(keep)
        for budget, (alive, (diverged, agreed)) in enumerate(zip(self.alive, found, strict=True)):
            self.sums.update(budget, torch.tensor(alive, device=ranks.device), diverged.clamp(max=-WORST), agreed)
        return [agreed for _, agreed in found]

    def _ranks(self, samples: Samples, most: int) -> Tensor:
        """The order in which each candidate's tokens join its set: int64 [N, B, T]."""
        visual, fold = samples.visual, fold_of(samples.images)
        ranks = torch.full((len(self.running), *visual.shape), most, device=visual.device)
        if self._shared:
            ranks[self._shared] = method_ranks(self._of_all, samples.seen, visual, most)
        for number in fold.unique().tolist() if self._own else []:
            here = samples.where(fold == number)
            found = method_ranks(self._of_fold[number], here.seen, here.visual, most)
            rows = (fold == number).nonzero()[:, 0]
            ranks[torch.tensor(self._own)[:, None], rows, : found.shape[2]] = found
        return ranks


class Check(Competition):
    """Frozen policies, beside the references, on samples that nothing was decided on.

    The first candidate alive at a budget is the policy's; its answers are kept for one question of each image.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        budgets: Sequence[int | float],
        alive: Sequence[Sequence[int]],
        belongs: Belongs,
        device: torch.device | None,
    ) -> None:
        super().__init__("checking the chosen policies", [candidates], budgets, alive, belongs, device)
        self.first = FirstQuestions(len(budgets)).to(device)
        nothing = torch.empty(0, dtype=torch.int64, device=device)  # a process may have no batch
        self.first.update(nothing, nothing, nothing.expand(len(budgets), 0))
        self.metrics["first questions"] = self.first

    def compare(self, samples: Samples) -> list[Tensor]:
        same = super().compare(samples)
        self.first.update(samples.images, samples.replay.questions, torch.stack([agreed[0] for agreed in same]))
        return same
