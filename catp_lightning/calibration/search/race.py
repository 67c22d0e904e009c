"""Passes that compare candidates by their answers to recorded samples: the rounds, and the check of the choice."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from catp_lightning.calibration.asked import Asked
from catp_lightning.calibration.fit.probes import floored
from catp_lightning.calibration.passes import Belongs, Pass
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.base import Variants
from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.calibration.search.candidate import Candidate
from catp_lightning.calibration.search.ranks import limits, token_ranks
from catp_lightning.calibration.search.sums import CandidateAnswers, CandidateSums, ImageAgreement
from catp_lightning.calibration.split import fold_of
from catp_lightning.methods.components import Question
from catp_lightning.methods.selection import Selection, protected_tokens
from catp_lightning.policy import PruningPolicy, Stage
from catp_lightning.pruning.pruner import Pruner


class Race(Pass):
    """Pass in which candidates answer the samples of one round, or of the checking part.

    Args:
        title: what is measured, shown to the user.
        plan: plan of the calibration.
        candidates: a list of candidates for each fold, fitted without the fold they are measured on; or a single list
            for all folds.
        budgets: budgets at which candidates are compared.
        alive: for each budget, the indices of the candidates that are still compared.
        belongs: says which samples are of this pass.
        parts: number of samples in each part of the split, which the choice of candidates depended on.
        device: device of the sums.
        question: components of the question, which are kept with each sample's answers; None: none are.

    Attributes:
        candidates: the candidates that are alive at any budget, for each fold.
    """

    def __init__(
        self,
        title: str,
        plan: Plan,
        candidates: Sequence[Sequence[Candidate]],
        budgets: Sequence[int | float],
        alive: Sequence[Sequence[int]],
        belongs: Belongs,
        parts: Mapping[str, int],
        device: torch.device | None,
        question: Question | None = None,
    ) -> None:
        self.title, self.plan, self.budgets, self.alive, self.belongs = title, plan, budgets, alive, belongs
        self.running = sorted(set().union(*alive))
        self.candidates = several = [[of_fold[number] for number in self.running] for of_fold in candidates]
        first, places = [candidate.method for candidate in several[0]], range(len(self.running))
        shared = [n for n in places if all(own[n] == several[0][n] for own in several)]
        entering = [n for n in places if not several[0][n].inside]
        ranked = [n for n in entering if first[n].nested]
        self._inside = [n for n in places if n not in entering]
        self._anew = [n for n in entering if n not in ranked]
        alone = [*self._anew, *self._inside]  # merged at the decoder's input, or chosen inside the decoder
        self._pruners: dict[PruningPolicy, Pruner] = {}
        self._policies = [[{n: own[n].policy(keep) for n in alone} for keep in budgets] for own in several]
        self._by_fold = any(n not in shared for n in alone)
        self._shared = [n for n in ranked if n in shared]
        self._own = [n for n in ranked if n not in shared]
        self._of_all = [first[n] for n in self._shared]
        self._of_fold = [[own[n].method for n in self._own] for own in several]
        self.sums = CandidateSums(len(budgets), len(candidates[0])).to(device)
        self.question = question
        self.answers = CandidateAnswers([len(some) for some in alive], 0 if question is None else question.count)
        self.answers = self.answers.to(device)
        nothing = torch.empty(0, dtype=torch.int64, device=device)  # a process may have no batch
        empty = [(nothing.new_zeros(len(some), 0), nothing.new_zeros(len(some), 0)) for some in alive]
        self.answers.update(nothing, nothing, nothing.new_zeros(0, self.answers.components), empty)
        self.metrics = {"candidates": self.sums, "answers": self.answers}
        # A later pass depends on the data of every process: one process that starts from the beginning may change it.
        depends = repr([several, list(budgets), [list(some) for some in alive], dict(parts), question])
        self.key = f"{title} {hashlib.sha256(depends.encode()).hexdigest()}"

    def see(self, samples: Samples, copies: Sequence[Samples] = ()) -> None:
        chosen = self.belongs(samples)
        if chosen.any():
            self.compare(samples.where(chosen), [copy.where(chosen) for copy in copies])

    def compare(self, samples: Samples, copies: Sequence[Samples] = ()) -> list[Tensor]:
        """Add answers to the sums; of the divergences of a sample and its copies on perturbed images the mean counts.

        Returns:
            For each budget bool [N, B]: True if the answer of one of its N candidates to the sample itself is the
            unpruned one.
        """
        if not self._by_fold:
            return self._compare(samples, 0, copies)
        fold = fold_of(samples.images, self.plan.settings.folds)
        same = [torch.empty(len(alive), len(fold), dtype=torch.bool, device=fold.device) for alive in self.alive]
        for number in fold.unique().tolist():
            own = [copy.where(fold == number) for copy in copies]
            for budget, agreed in enumerate(self._compare(samples.where(fold == number), number, own)):
                same[budget][:, fold == number] = agreed
        return same

    def _compare(self, samples: Samples, fold: int, copies: Sequence[Samples]) -> list[Tensor]:
        """Run `compare` with non-nested policies of `fold`; all samples are of it if these policies differ by fold."""
        found, together = [self._answers(some, fold) for some in (samples, *copies)], []
        for budget, each in enumerate(zip(*found, strict=True)):
            # The mean first: a sample and its copies are no independent samples, and errors would come out too small.
            diverged = torch.stack([diverged.double() for diverged, _ in each]).mean(0)
            self.sums.update(budget, self._numbers(budget, diverged.device), diverged, each[0][1])
            together.append((diverged, each[0][1]))
        asked = samples.images.new_zeros(len(samples.images), 0)
        if self.question is not None:
            asked = samples.of_images(self.question.components(samples.seen))
        self.answers.update(samples.keys, samples.images, asked, together)
        return [agreed for _, agreed in found[0]]

    def _numbers(self, budget: int, device: torch.device) -> Tensor:
        """Return the indices of the candidates that are compared at a budget: int64 [N]."""
        return torch.tensor(self.alive[budget], device=device, dtype=torch.int64)

    def _answers(self, samples: Samples, fold: int) -> list[tuple[Tensor, Tensor]]:
        """Return, for each budget, divergence of its candidates' answers, [N, B], and where they agree, bool [N, B]."""
        visual, found, order = samples.visual, [], []
        if not visual.any():  # there is nothing to prune: every answer is the unpruned one
            same = [torch.ones(len(alive), len(visual), dtype=torch.bool, device=visual.device) for alive in self.alive]
            return [(torch.zeros_like(agreed, dtype=torch.float64), agreed) for agreed in same]
        allowed = [limits(keep, samples.seen, visual) for keep in self.budgets]
        ranks = self._ranks(samples, max(1, *(int(limit.max()) for limit in allowed)))
        stay, entries = protected_tokens(samples.seen, visual), dict[Stage, Selection]()
        for budget, (limit, alive) in enumerate(zip(allowed, self.alive, strict=True)):
            running = [self.running.index(number) for number in alive]
            ranked = [place for place in running if place in self._shared or place in self._own]
            anew, inside = ([place for place in running if place in own] for own in (self._anew, self._inside))
            policies = self._policies[fold][budget]
            whole = [place for place in inside if policies[place].everything]  # nothing leaves anywhere
            anew, inside = [*anew, *whole], [place for place in inside if place not in whole]
            selections = [self._selection(samples, policies[place]) for place in anew]
            pruners = [self._inside_of(samples, policies[place], entries) for place in inside]
            found.append(Variants((ranks[ranked] < limit) | stay, selections, pruners))
            places = [*ranked, *anew, *inside]
            order.append(
                torch.tensor([places.index(place) for place in running], device=ranks.device, dtype=torch.int64)
            )
        compared = zip(samples.replay.compare_each(found), order, strict=True)
        return [(-floored(-diverged[place]), agreed[place]) for (diverged, agreed), place in compared]

    def _inside_of(
        self, samples: Samples, policy: PruningPolicy, entries: dict[Stage, Selection]
    ) -> tuple[Pruner, Selection | None]:
        """Return what prunes inside the decoder, and what stays at its input, which schedules share in `entries`."""
        if policy not in self._pruners:
            self._pruners[policy] = Pruner(self.plan.family, policy)
        pruner, first = self._pruners[policy], policy.stages[0]
        if pruner.leave_at[0]:
            return pruner, None
        if first not in entries:
            method = pruner.places[0].step.method
            entries[first] = method.select(samples.seen, first.keep, samples.visual)
        return pruner, entries[first]

    def _selection(self, samples: Samples, policy: PruningPolicy) -> Selection:
        """Return the selection of a candidate without nested ranking."""
        if policy.everything:
            return Selection(samples.visual)
        return policy.method().select(samples.seen, policy.keep, samples.visual)

    def _ranks(self, samples: Samples, max_tokens: int) -> Tensor:
        """Return the ranks in which tokens join each candidate's set, int64 [N, B, T]; `max_tokens` if not nested."""
        visual, fold = samples.visual, fold_of(samples.images, self.plan.settings.folds)
        ranks = torch.full((len(self.running), *visual.shape), max_tokens, device=visual.device, dtype=torch.int64)
        if self._shared:
            ranks[self._shared] = token_ranks(self._of_all, samples.seen, visual, max_tokens)
        for number in fold.unique().tolist() if self._own else []:
            here = samples.where(fold == number)
            found = token_ranks(self._of_fold[number], here.seen, here.visual, max_tokens)
            rows = (fold == number).nonzero()[:, 0]
            ranks[torch.tensor(self._own, dtype=torch.int64, device=ranks.device)[:, None], rows, : found.shape[2]] = (
                found
            )
        return ranks


class Check(Race):
    """Stage that compares the frozen policies with the references on samples on which nothing was decided.

    The first candidate alive at a budget is the chosen one. A promise is tested on its answers, as `Promise` says; with
    the references it is compared by all answers, image by image. Copies on perturbed images count in none of these
    figures, but in sums of their own.

    Attributes:
        perturbed: sums of the copies of each perturbation, by its name.
    """

    def __init__(
        self,
        plan: Plan,
        candidates: Sequence[Candidate],
        budgets: Sequence[int | float],
        alive: Sequence[Sequence[int]],
        belongs: Belongs,
        parts: Mapping[str, int],
        device: torch.device | None,
    ) -> None:
        super().__init__("checking the chosen policies", plan, [candidates], budgets, alive, belongs, parts, device)
        self._most = max(map(len, alive))
        self.asked = Asked(len(budgets)).to(device)
        self.by_image = ImageAgreement(len(budgets), self._most).to(device)
        nothing = torch.empty(0, dtype=torch.int64, device=device)  # a process may have no batch
        self.asked.update(nothing, nothing, nothing, nothing.bool().expand(len(budgets), 0))
        self.by_image.update(nothing, nothing.expand(len(budgets), self._most, 0))
        self.metrics |= {"asked": self.asked, "by image": self.by_image}
        self.perturbed = {name: CandidateSums(len(budgets), len(candidates)).to(device) for name in plan.perturbations}
        self.metrics |= {f"perturbed {number}": sums for number, sums in enumerate(self.perturbed.values())}

    def compare(self, samples: Samples, copies: Sequence[Samples] = ()) -> list[Tensor]:
        same = super().compare(samples)
        chosen = torch.stack([agreed[0] for agreed in same])
        self.asked.update(samples.images, samples.group_keys, samples.keys, chosen)
        padded = [torch.nn.functional.pad(agreed, (0, 0, 0, self._most - len(agreed))) for agreed in same]
        self.by_image.update(samples.images, torch.stack(padded))
        for copy, sums in zip(copies, self.perturbed.values(), strict=True):
            for budget, (diverged, agreed) in enumerate(self._answers(copy, 0)):
                sums.update(budget, self._numbers(budget, diverged.device), diverged, agreed)
        return same
