"""Stages of a calibration: each reads the split once and adds up its findings in metrics."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from catp_lightning.calibration import statistics
from catp_lightning.calibration.asked import Asked, AskedImages, GroupNames
from catp_lightning.calibration.fit.probes import Columns, pair_rows, probe, scores_of_heads, sizes
from catp_lightning.calibration.fit.sums import (
    FoldSums,
    ImageSet,
    PartCounts,
    ProbeSums,
    TokenCounts,
)
from catp_lightning.calibration.passes import Pass
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.calibration.split import fold_of
from catp_lightning.methods.observation import Signal
from catp_lightning.methods.question import Question
from catp_lightning.methods.selection import images_to_samples, protected_tokens
from catp_lightning.utils.hashing import mix

PAIRS = 40
"""Limit on the slots up to which pairs are fitted too: the sums grow with the fourth power of their number."""


@dataclass(frozen=True)
class Learned:
    """What probing found, reduced over all processes.

    Attributes:
        columns: column layout of the sums.
        sums: sums of the probes by fold.
        pairs: sums of the probes on pairs of slots; None where slots have no meaning or are too many.
        images: int64, fingerprints of all images.
        not_finite: int64, keys of the samples to which the unpruned model's own answer is not a number.
        parts: number of samples in each part of the split.
        tokens: mean number of droppable visual tokens of an image.
        statistics: entries of the statistics in the evidence, by name.
        asked: number of questions about each image, by group; samples without an image are left out. None if no
            promise is to be tested.
        groups: names of the groups, by checksum.
    """

    columns: Columns
    sums: FoldSums
    pairs: FoldSums | None
    images: Tensor
    not_finite: Tensor
    parts: dict[str, int]
    tokens: float
    statistics: dict[str, Any]
    asked: AskedImages | None
    groups: dict[int, str]


class Probing(Pass):
    """Pass that probes the learning part by random subsets, and adds up statistics of all samples."""

    title = key = "measuring what each visual token is worth"

    def __init__(
        self,
        plan: Plan,
        budgets: Sequence[int | float],
        part_of: Callable[[Tensor], Tensor],
        device: torch.device | None,
        counting: bool = False,
        question: Question | None = None,
    ) -> None:
        self.plan, self.columns, self.part_of = plan, Columns.of(plan, question), part_of
        if question is not None:  # another process may begin anew and find others
            self.key = f"{self.title} {hashlib.sha256(repr(question).encode()).hexdigest()}"
        self.sizes = sizes(budgets, plan.family.tokens_per_image, plan.settings.sizes) if self.columns.total else []
        self.sums = ProbeSums(self.columns.total, plan.settings.folds).to(device)
        self.images, self.parts = ImageSet().to(device), PartCounts().to(device)
        self.tokens, self.not_finite = TokenCounts().to(device), ImageSet().to(device)
        nothing = torch.empty(0, dtype=torch.int64, device=device)  # a process may have no batch
        self.images.update(nothing)
        self.not_finite.update(nothing)
        self.metrics = {
            "probes": self.sums,
            "images": self.images,
            "parts": self.parts,
            "tokens": self.tokens,
            "not_finite": self.not_finite,
        }
        self.statistics = {one.name: one.of(plan).to(device) for one in statistics.STATISTICS}
        self.metrics |= self.statistics
        self.asked: Asked | None = None
        if counting:  # the questions about each image, for a promise
            self.asked, self.names = Asked().to(device), GroupNames().to(device)
            self.asked.update(nothing, nothing, nothing, nothing.bool().expand(0, 0))
            self.names.update({})
            self.metrics |= {"asked": self.asked, "group names": self.names}
        self.pairs: ProbeSums | None = None
        slots = self.columns.slots
        if 0 < slots <= PAIRS:
            self.metrics["pairs"] = self.pairs = ProbeSums(slots * (slots + 1) // 2, plan.settings.folds).to(device)

    def see(self, samples: Samples, copies: Sequence[Samples] = ()) -> None:
        # One NaN would make all sums NaN, and nothing can be learnt where the model itself gives no finite answer.
        finite = samples.replay.is_finite()
        for copy in copies:
            finite = finite & copy.replay.is_finite()
        self.not_finite.update(samples.keys[~finite])
        if finite.any():
            every = bool(finite.all())
            self._measure(*(some if every else some.where(finite) for some in (samples, *copies)))

    def _measure(self, samples: Samples, *copies: Samples) -> None:
        part = self.part_of(samples.images)
        self.parts.update(part)
        self.images.update(samples.seen[Signal.IMAGE_HASH])
        self.tokens.update(samples.seen.droppable.sum(1))
        if self.asked is not None:
            there = samples.images != 0
            images, nothing = samples.images[there], there.new_empty(0, int(there.sum()))
            self.asked.update(images, samples.group_keys[there], samples.keys[there], nothing)
            self.names.update({} if samples.groups is None else samples.groups.names)
        for statistic in self.statistics.values():
            for some in (samples, *copies) if statistic.copies else (samples,):
                statistic.update(some)
        if (part == 0).any():
            for number, some in enumerate((samples, *copies)):
                self._probe(some.where(part == 0), number)

    def _probe(self, samples: Samples, copy: int) -> None:
        """Add the probes of samples; `copy` is 0, or the number of their perturbation, so that subsets are others."""
        seen = samples.seen if samples.inside is None else samples.inside
        head_scores = scores_of_heads(self.plan.scorers.values(), seen, samples.visual)
        fold, owner = fold_of(samples.images, self.plan.settings.folds), None
        stay = protected_tokens(samples.seen, samples.visual) if samples.inside is None else None
        stay = stay if stay is not None and bool(stay.any()) else None
        if self.plan.family.reads == "cross-attention":  # the text must see at least one row of each image
            valid = samples.seen.valid
            images = torch.arange(len(valid), device=valid.device)[:, None].expand(valid.shape)
            owner = images_to_samples(images, valid, samples.visual, 0)
        question = self.columns.question
        asked = None if question is None else samples.of_images(question.components(samples.seen))
        for number, size in enumerate(self.sizes):
            found = probe(
                samples.replay,
                head_scores,
                mix(samples.images + copy) if copy else samples.images,
                size,
                number,
                self.columns.slots,
                owner,
                stay,
                self.plan.settings.probes,
                asked,
            )
            self.sums.update(fold, found.rows, found.gain)
            if self.pairs is not None:
                self.pairs.update(fold, pair_rows(found.slots), found.gain)

    def learned(self) -> Learned:
        """Return what was found, over all processes: each must call this."""
        return Learned(
            self.columns,
            self.sums.compute(),
            None if self.pairs is None else self.pairs.compute(),
            self.images.compute(),
            self.not_finite.compute(),
            self.parts.compute(),
            self.tokens.compute(),
            {name: statistic.compute() for name, statistic in self.statistics.items()},
            None if self.asked is None else self.asked.compute(),
            {} if self.asked is None else self.names.compute(),
        )
