"""Stages of a calibration: each reads the split once and adds up its findings in metrics."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from catp_lightning.calibration import statistics
from catp_lightning.calibration.asked import Asked, AskedImages, GroupNames
from catp_lightning.calibration.fit.probes import Columns, Probes, pair_rows, probe, scores_of_heads, sizes
from catp_lightning.calibration.fit.records import ProbeRecords, Recorded
from catp_lightning.calibration.fit.sums import ImageSet, PartCounts, ProbeSums, PromptSizes, TokenCounts
from catp_lightning.calibration.passes import Pass
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.calibration.split import fold_of
from catp_lightning.methods.components import Features, Question
from catp_lightning.methods.observation import Signal
from catp_lightning.methods.selection import images_to_samples, protected_tokens
from catp_lightning.utils.hashing import mix

PAIRS = 40
"""Limit on the slots up to which pairs are fitted too: the sums grow with the fourth power of their number."""


@dataclass(frozen=True)
class Learned:
    """What is known of the split after probing, reduced over all processes.

    Attributes:
        images: int64, fingerprints of all images.
        not_finite: int64, keys of the samples to which the unpruned model's own answer is not a number.
        parts: number of samples in each part of the split.
        tokens: mean number of droppable visual tokens of an image.
        largest: number of visual tokens of the largest image.
        statistics: entries of the statistics in the evidence, by name.
        asked: number of questions about each image, by group; samples without an image are left out. None if no
            promise is to be tested.
        groups: names of the groups, by checksum.
        sizes: sizes of all prompts, int64 [N, 4], as `Replay.sizes`; None if budgets are no prices.
    """

    images: Tensor
    not_finite: Tensor
    parts: dict[str, int]
    tokens: float
    largest: int
    statistics: dict[str, Any]
    asked: AskedImages | None
    groups: dict[int, str]
    sizes: Tensor | None


class ProbeRecorder:
    """Records what each sample's probes kept and gained, with the components of its tokens and of its question.

    Args:
        plan: plan of the calibration.
        components: those of questions and tokens.
        device: device of the records.

    Attributes:
        sizes: sizes that are recorded: the plan's own, at which answers change, whatever the budgets.
        records: the records.
        key: text of what the records depend on.
    """

    def __init__(self, plan: Plan, components: tuple[Question, Features], device: torch.device | None) -> None:
        self.question, self.features = components
        self.folds, self.sizes = plan.settings.folds, sizes((), plan.family.tokens_per_image, plan.settings.sizes)
        counts = self.features.count, self.question.count
        self.records = ProbeRecords(*counts, len(self.sizes), plan.settings.probes).to(device)
        # Another process may begin anew and find other components.
        self.key = hashlib.sha256(repr(components).encode()).hexdigest()

    def record(self, samples: Samples, copy: int, found: Sequence[Probes]) -> None:
        """Record samples; `copy` is the number of their perturbation, and `found` has the probes of each of `sizes`."""
        visual = samples.visual
        features = images_to_samples(self.features.components(samples.seen), samples.seen.valid, visual, 0.0)
        question = samples.of_images(self.question.components(samples.seen))
        self.records.update(
            Recorded(
                keys=mix(samples.keys + copy),
                folds=fold_of(samples.images, self.folds),
                counts=visual.sum(1),
                question=question.float(),
                features=features[visual].nan_to_num(0.0, 0.0, 0.0).float(),
                kept=torch.stack([one.kept for one in found]).permute(2, 3, 0, 1)[visual],
                gain=torch.stack([one.gain for one in found]).permute(2, 0, 1).float(),
            )
        )


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
        components: tuple[Question, Features] | None = None,
    ) -> None:
        self.plan, self.columns, self.part_of = plan, Columns.of(plan), part_of
        measured = self.columns.total or components is not None
        self.sizes = sizes(budgets, plan.family.tokens_per_image, plan.settings.sizes) if measured else []
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
        self.prompts: PromptSizes | None = None
        if plan.unit is not None:
            self.metrics["prompts"] = self.prompts = PromptSizes().to(device)
            self.prompts.update(nothing.new_zeros(0, 4))
        self.asked: Asked | None = None
        if counting:  # the questions about each image, for a promise
            self.asked, self.names = Asked().to(device), GroupNames().to(device)
            self.asked.update(nothing, nothing, nothing, nothing.bool().expand(0, 0))
            self.names.update({})
            self.metrics |= {"asked": self.asked, "group names": self.names}
        self.pairs: ProbeSums | None = None
        self.recorder: ProbeRecorder | None = None
        if components is not None and plan.settings.sizes:
            self.recorder = ProbeRecorder(plan, components, device)
            self.metrics["records"] = self.recorder.records
            self.key = f"{self.title} {self.recorder.key}"
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
        self.tokens.update(samples.seen.droppable, samples.seen.valid)
        if self.prompts is not None:
            self.prompts.update(_sizes(samples, self.plan))
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
        fold, found = fold_of(samples.images, self.plan.settings.folds), {}
        measured = probes(self.plan, samples, head_scores, self.sizes, copy, self.columns.slots)
        for size, one in zip(self.sizes, measured, strict=True):
            self.sums.update(fold, one.rows, one.gain)
            if self.pairs is not None:
                self.pairs.update(fold, pair_rows(one.slots), one.gain)
            found[size] = one
        if self.recorder is not None:
            self.recorder.record(samples, copy, [found[size] for size in self.recorder.sizes])

    def learned(self) -> Learned:
        """Return what is known of the split, over all processes: each must call this."""
        return Learned(
            self.images.compute(),
            self.not_finite.compute(),
            self.parts.compute(),
            *self.tokens.compute(),
            {name: statistic.compute() for name, statistic in self.statistics.items()},
            None if self.asked is None else self.asked.compute(),
            {} if self.asked is None else self.names.compute(),
            None if self.prompts is None else self.prompts.compute().cpu(),
        )


def _sizes(samples: Samples, plan: Plan) -> Tensor:
    """Return the sizes of prompts, int64 [B, 4], as `Replay.sizes`; visual tokens that always stay count as text."""
    sizes = samples.replay.sizes
    if plan.family.reads == "cross-attention":
        return sizes
    stay = protected_tokens(samples.seen, samples.visual).sum(1)
    return sizes + stay[:, None] * sizes.new_tensor([1, -1, -1, 0])


def probes(
    plan: Plan,
    samples: Samples,
    head_scores: Tensor,
    sizes: Sequence[float],
    copy: int = 0,
    slots: int = 0,
    scores: Tensor | None = None,
) -> Iterator[Probes]:
    """Yield the probes of samples at each size.

    Args:
        plan: plan of the calibration.
        samples: B samples.
        head_scores: float [B, T, V], as in `probe`.
        sizes: shares of the tokens to keep.
        copy: 0, or the number of the samples' perturbation, so that their subsets are others.
        slots: number of slots of an image; 0: slots are not counted.
        scores: float [B, T], as in `random_subset`.
    """
    stay = protected_tokens(samples.seen, samples.visual) if samples.inside is None else None
    stay, owner = stay if stay is not None and bool(stay.any()) else None, None
    if plan.family.reads == "cross-attention":  # the text must see at least one row of each image
        valid = samples.seen.valid
        images = torch.arange(len(valid), device=valid.device)[:, None].expand(valid.shape)
        owner = images_to_samples(images, valid, samples.visual, 0)
    own = mix(samples.images + copy) if copy else samples.images
    for number, size in enumerate(sizes):
        yield probe(samples.replay, head_scores, own, size, number, slots, owner, stay, plan.settings.probes, scores)
