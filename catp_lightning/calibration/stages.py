"""The stages of a calibration: each reads the split once, and adds up what it finds in metrics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torchmetrics import Metric

from catp_lightning.calibration.candidates import Candidate
from catp_lightning.calibration.importance import WORST, Columns, head_votes, probe, sizes
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay import Replay, Ways
from catp_lightning.calibration.sets import always, is_nested, limits, method_ranks, methods, pair_rows
from catp_lightning.calibration.split import fold_of
from catp_lightning.calibration.statistics import (
    CandidateSums,
    FirstQuestions,
    ImageSet,
    PartCounts,
    ProbeSums,
    RankCorrelation,
    TokenCounts,
)
from catp_lightning.choosing import Choice, choose_tokens, placed, score_tokens
from catp_lightning.fingerprint import mix
from catp_lightning.observation import Observation, Signal
from catp_lightning.policy import PruningPolicy
from catp_lightning.pruning import Pruning
from catp_lightning.scorers import Scorer
from catp_lightning.selectors import Selector, without_autocast

PAIRS = 40
"""Slots whose pairs are learned too, at most: the sums grow with the fourth power of their number."""


@dataclass(frozen=True)
class Samples:
    """A batch of B samples with I images.

    Attributes:
        replay: their prompts and the unpruned answers.
        seen: the signals of their images.
        images: int64 [B], the fingerprint of each sample's first image; 0 for a sample without one.
        inside: what was seen inside the language model, as one image a sample; None where nothing was.
    """

    replay: Replay
    seen: Observation
    images: Tensor

    inside: Observation | None = None

    @classmethod
    def of(cls, replay: Replay, seen: Observation, inside: Observation | None = None) -> "Samples":
        of_images, images = _sample_of_images(replay.tokens, seen), seen[Signal.FINGERPRINT]
        first = torch.zeros(len(replay.tokens), dtype=torch.int64, device=images.device)
        # Backwards, so that of several images of a sample the first is written last.
        for image in reversed(range(len(images))):
            first[of_images[image]] = images[image]
        return cls(replay, seen, first, inside)

    def where(self, chosen: Tensor) -> "Samples":
        """Some of them: bool [B]."""
        return Samples(
            self.replay.of_samples(chosen),
            self.seen.of_images(chosen[_sample_of_images(self.visual, self.seen)]),
            self.images[chosen],
            None if self.inside is None else self.inside.of_images(chosen),
        )

    @property
    def visual(self) -> Tensor:
        """Which visual tokens each sample has: bool [B, T]."""
        return self.replay.tokens

    @property
    def key(self) -> int:
        """A checksum of all images and questions, whatever their order."""
        together = mix(self.images ^ self.replay.questions).sum() + mix(self.seen[Signal.FINGERPRINT]).sum()
        return int(together)


def _sample_of_images(visual: Tensor, seen: Observation) -> Tensor:
    """The sample each image belongs to: int64 [I]."""
    ends = visual.sum(1).cumsum(0)
    return torch.bucketize(seen.exists.sum(1).cumsum(0) - 1, ends, right=True)


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
        self, plan: Plan, budgets: Sequence[int | float], part_of: Belongs, device: torch.device | None
    ) -> None:
        self.plan, self.columns, self.part_of = plan, Columns.of(plan), part_of
        self.sizes = sizes(budgets, plan.family.tokens_per_image) if self.columns.total else []
        self.sums = ProbeSums(self.columns.total).to(device)
        self.images, self.parts = ImageSet().to(device), PartCounts().to(device)
        self.tokens = TokenCounts().to(device)
        self.images.update(torch.empty(0, dtype=torch.int64, device=device))  # a process may have no batch
        self.metrics: dict[str, Metric] = {
            "probes": self.sums,
            "images": self.images,
            "parts": self.parts,
            "tokens": self.tokens,
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
        part = self.part_of(samples.images)
        self.parts.update(part)
        self.images.update(samples.seen[Signal.FINGERPRINT])
        self.tokens.update(samples.seen.free.sum(1))
        voted_on = samples.seen if samples.inside is None else samples.inside
        whole = voted_on.free.all(1)  # of images that are padded, ranks are others
        with without_autocast(part):
            for name, metric in self.correlations.items():
                metric.update(self.plan.voters[name].votes(voted_on).sum(2)[whole])
        if (part == 0).any():
            self._probe(samples.where(part == 0))

    def _probe(self, samples: Samples) -> None:
        seen = samples.seen if samples.inside is None else samples.inside
        votes = head_votes(self.plan.voters.values(), seen, samples.visual)
        fold, owner = fold_of(samples.images), None
        if self.plan.family.reads == "cross-attention":  # text must not be left without a row of its image
            exists = samples.seen.exists
            images = torch.arange(len(exists), device=exists.device)[:, None].expand(exists.shape)
            owner = placed(images, exists, samples.visual, 0)
        for number, size in enumerate(self.sizes):
            found = probe(samples.replay, votes, samples.images, size, number, self.columns.slots, owner)
            self.sums.update(fold, found.rows, found.gain)
            if self.pairs is not None:
                self.pairs.update(fold, pair_rows(found.slots), found.gain)


class Competition:
    """Candidates answer the samples of one round, or of the checking part.

    Args:
        title: what people are told.
        plan: of the calibration.
        candidates: by fold: what is fitted was fitted without the fold it is measured on. Or one list for all folds.
        budgets: at each of which some candidates compete.
        alive: their numbers, for each budget.
        belongs: which samples this is for.
        device: where the sums are kept.
    """

    def __init__(
        self,
        title: str,
        plan: Plan,
        candidates: Sequence[Sequence[Candidate]],
        budgets: Sequence[int | float],
        alive: Sequence[Sequence[int]],
        belongs: Belongs,
        device: torch.device | None,
    ) -> None:
        self.title, self.plan, self.budgets, self.alive, self.belongs = title, plan, budgets, alive, belongs
        self.running = sorted(set().union(*alive))
        self.rules = [[of_fold[number].policy(1.0) for number in self.running] for of_fold in candidates]
        self._policies = [
            [[of_fold[number].policy(keep) for number in self.running] for keep in budgets] for of_fold in candidates
        ]
        places = range(len(self.running))
        first = self.rules[0]
        shared = [n for n in places if all(of_fold[n] == first[n] for of_fold in self.rules)]
        entering = [n for n in places if not first[n].build_scorer().stages(plan.family.depth)]
        ranked = [n for n in entering if is_nested(_method(first[n]))]
        self._inside = [n for n in places if n not in entering]
        self._anew = [n for n in entering if n not in ranked]
        self._by_fold = any(n not in shared for n in (*self._anew, *self._inside))
        self._shared = [n for n in ranked if n in shared]
        self._own = [n for n in ranked if n not in shared]
        self._of_all = methods([first[n] for n in self._shared])
        self._of_fold = [methods([of_fold[n] for n in self._own]) for of_fold in self.rules]
        self.sums = CandidateSums(len(budgets), len(candidates[0])).to(device)
        self.metrics: dict[str, Metric] = {"candidates": self.sums}

    def see(self, samples: Samples) -> None:
        chosen = self.belongs(samples.images)
        if chosen.any():
            self.compare(samples.where(chosen))

    def compare(self, samples: Samples) -> list[Tensor]:
        """Whether each candidate's answer is the unpruned one: bool [N, B] for each budget, N alive there."""
        if not self._by_fold:
            return self._compare(samples, 0)
        fold = fold_of(samples.images)
        same = [torch.empty(len(alive), len(fold), dtype=torch.bool, device=fold.device) for alive in self.alive]
        for number in fold.unique().tolist():
            for budget, agreed in enumerate(self._compare(samples.where(fold == number), number)):
                same[budget][:, fold == number] = agreed
        return same

    def _compare(self, samples: Samples, fold: int) -> list[Tensor]:
        """Of samples of one fold, where candidates that are chosen anew differ between folds."""
        visual, found, order = samples.visual, [], []
        if not visual.any():  # there is nothing to prune: every answer is the unpruned one
            same = [torch.ones(len(alive), len(visual), dtype=torch.bool, device=visual.device) for alive in self.alive]
            for budget, agreed in enumerate(same):
                numbers = torch.tensor(self.alive[budget], device=visual.device)
                self.sums.update(budget, numbers, torch.zeros_like(agreed, dtype=torch.float64), agreed)
            return same
        allowed = [limits(keep, samples.seen, visual) for keep in self.budgets]
        ranks = self._ranks(samples, max(1, *(int(limit.max()) for limit in allowed)))
        stay = always(samples.seen, visual)
        for budget, (limit, alive) in enumerate(zip(allowed, self.alive, strict=True)):
            running = [self.running.index(number) for number in alive]
            ranked = [place for place in running if place in self._shared or place in self._own]
            others = [place for place in running if place not in ranked]
            policies = self._policies[fold][budget]
            chosen = [self._other(samples, policies[place], place in self._inside) for place in others]
            found.append(Ways((ranks[ranked] < limit) | stay, chosen))
            order.append(torch.tensor([[*ranked, *others].index(place) for place in running], device=ranks.device))
        same = []
        compared = samples.replay.compare_each(found)
        for budget, (diverged, agreed) in enumerate(compared):
            numbers, place = torch.tensor(self.alive[budget], device=ranks.device), order[budget]
            self.sums.update(budget, numbers, diverged[place].clamp(max=-WORST), agreed[place])
            same.append(agreed[place])
        return same

    def _other(self, samples: Samples, policy: PruningPolicy, inside: bool) -> Choice | Pruning:
        """A candidate that chooses anew at each budget, or inside the decoder."""
        if inside:
            return Pruning(self.plan.family, policy)
        scorer, selector = _method(policy)
        scores = score_tokens(scorer, samples.seen, samples.visual)
        return choose_tokens(scores, selector, policy.keep, samples.seen, samples.visual)

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


def _method(policy: PruningPolicy) -> tuple[Scorer, Selector]:
    return policy.build_scorer(), policy.build_selector()


class Check(Competition):
    """Frozen policies, beside the references, on samples that nothing was decided on.

    The first candidate alive at a budget is the policy's; its answers are kept for one question of each image.
    """

    def __init__(
        self,
        plan: Plan,
        candidates: Sequence[Candidate],
        budgets: Sequence[int | float],
        alive: Sequence[Sequence[int]],
        belongs: Belongs,
        device: torch.device | None,
    ) -> None:
        super().__init__("checking the chosen policies", plan, [candidates], budgets, alive, belongs, device)
        self.first = FirstQuestions(len(budgets)).to(device)
        nothing = torch.empty(0, dtype=torch.int64, device=device)  # a process may have no batch
        self.first.update(nothing, nothing, nothing.expand(len(budgets), 0))
        self.metrics["first questions"] = self.first

    def compare(self, samples: Samples) -> list[Tensor]:
        same = super().compare(samples)
        self.first.update(samples.images, samples.replay.questions, torch.stack([agreed[0] for agreed in same]))
        return same
