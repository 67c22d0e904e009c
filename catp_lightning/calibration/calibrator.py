"""Compares candidate policies with the unpruned model, batch by batch, and picks one for each budget.

The split is divided by image. On the first part probes measure what each slot is worth; on the second, candidates built
from that and all fixed rules are compared; on the third nothing is decided, so its figures are those to quote.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from catp_lightning.calibration.candidates import Candidate, default_candidates, fitted_candidates
from catp_lightning.calibration.replay import Replay, agreement, divergence
from catp_lightning.calibration.slots import PROBES, SlotSums, random_subset
from catp_lightning.calibration.statistics import PARTS, CandidateSums, part_of
from catp_lightning.choosing import choose_tokens, score_tokens, visual_tokens
from catp_lightning.errors import PolicyError
from catp_lightning.families import Family
from catp_lightning.metrics import wilson_interval
from catp_lightning.observation import Needs, Observation, Signal, join
from catp_lightning.policy import PruningPolicy, check_keep
from catp_lightning.scorers import Scorer
from catp_lightning.selectors import keep_count

WORST = -10.0  # mean log-probability; below, an answer is lost, and how far it is lost says nothing


class Calibrator:
    """Call `probe` on every batch, `fit` once, `compare` on every batch again, then `policies`.

    Args:
        family: of the model that is calibrated.
        budgets: shares or numbers of tokens, each with a choice of its own.
        device: where the sums are kept.
    """

    def __init__(self, family: Family, budgets: Sequence[int | float], device: torch.device | None = None) -> None:
        for keep in budgets:
            check_keep(keep)
        if not budgets or len({(type(keep), keep) for keep in budgets}) < len(budgets):
            raise PolicyError(f"keep is {list(budgets)}; give one budget or several different ones.")
        self.family, self.budgets = family, tuple(budgets)
        slots = family.tokens_per_image
        self.slots = SlotSums(len(budgets), slots).to(device)
        # Names and number of candidates are known before anything is fitted.
        self.candidates = [self._candidates([0.0] * slots) for _ in budgets]
        self.probed = 0
        self.sums = CandidateSums(len(budgets), len(self.candidates[0])).to(device)

    def _candidates(self, weights: Sequence[float]) -> list[Candidate]:
        return [*default_candidates(self.family), *fitted_candidates(self.family, weights)]

    @property
    def needs(self) -> Needs:
        """The signals all candidates read together."""
        policies = [candidate.policy(1.0) for candidate in self.candidates[0]]
        needs = [need for p in policies for need in (p.build_scorer().needs, p.build_selector().needs)]
        return join([{Signal.FINGERPRINT: None}, *needs])

    def probe(self, replay: Replay, seen: Observation) -> None:
        """Measure random subsets of the samples that are for fitting.

        Args:
            replay: the prompts and the unpruned answers of a batch.
            seen: what `needs` names, of the same batch.
        """
        visual = visual_tokens(replay.visual)
        images = _first_image(seen, visual)
        chosen = part_of(images) == -1
        if not chosen.any():
            return
        replay, visual, images = replay.of_samples(chosen), visual[chosen], images[chosen]
        for index, keep in enumerate(self.budgets):
            counts = torch.tensor([keep_count(keep, count) for count in visual.sum(1).tolist()], device=visual.device)
            subsets = [random_subset(images, visual, counts, PROBES * index + number) for number in range(PROBES)]
            gain = torch.stack([replay.answer_log_probability(subset).clamp(min=WORST) for subset in subsets])
            by_slot = torch.stack(subsets).unflatten(2, (-1, seen.tokens)).sum(2)
            self.slots.update(index, by_slot.double(), gain)

    def fit(self) -> None:
        """Turn what the probes of all processes measured into candidates."""
        weights, samples = self.slots.compute()
        self.candidates = [self._candidates(of_budget) for of_budget in weights.tolist()]
        self.probed = int(samples)

    def compare(self, replay: Replay, seen: Observation) -> None:
        """Answer the samples that are not for fitting again, under every candidate at every budget; as `probe`."""
        visual = visual_tokens(replay.visual)
        part = part_of(_first_image(seen, visual))
        chosen = part >= 0
        if not chosen.any():
            return
        owner = torch.repeat_interleave(torch.arange(len(visual), device=part.device), visual.sum(1) // seen.tokens)
        replay, seen, visual, part = (
            replay.of_samples(chosen),
            seen.of_images(chosen[owner]),
            visual[chosen],
            part[chosen],
        )
        valid, full = replay.answers.valid, replay.log_probabilities(visual)
        scores: dict[Scorer, Tensor] = {}  # many candidates and budgets share a scorer
        diverged, agreed = [], []
        for keep, candidates in zip(self.budgets, self.candidates, strict=True):
            for policy in (candidate.policy(keep) for candidate in candidates):
                scorer = policy.build_scorer()
                if scorer not in scores:
                    scores[scorer] = score_tokens(scorer, seen, visual)
                kept, _ = choose_tokens(scores[scorer], policy.build_selector(), keep, seen, visual)
                pruned = replay.log_probabilities(kept)
                diverged.append(divergence(full, pruned, valid))
                agreed.append(agreement(full, pruned, valid))
        shape = (len(self.budgets), len(self.candidates[0]), len(visual))
        self.sums.update(part, torch.stack(diverged).view(shape), torch.stack(agreed).view(shape))

    def policies(self) -> list[PruningPolicy]:
        """A policy for each budget: the candidate with the smallest mean divergence on the choosing part.

        Raises:
            PolicyError: a part of the split holds no sample.
        """
        sums = self.sums.compute()
        if not bool((sums["count"] > 0).all()):
            count = dict(zip(PARTS, sums["count"].tolist(), strict=True))
            raise PolicyError(
                f"Calibration needs samples in every part of its split, got {count}. Give it some dozens of images."
            )
        return [self._policy(index, sums) for index in range(len(self.budgets))]

    def _policy(self, index: int, sums: dict[str, Tensor]) -> PruningPolicy:
        candidates = self.candidates[index]
        rows = [_figures(candidate, index, number, sums) for number, candidate in enumerate(candidates)]
        best = min(range(len(rows)), key=lambda n: (rows[n]["choose"]["divergence"], rows[n]["name"]))
        chosen = candidates[best]
        evidence = {
            "chosen": chosen.name,
            "control": chosen.control,
            "samples": {"fit": self.probed, **dict(zip(PARTS, sums["count"].tolist(), strict=True))},
            "candidates": sorted(rows, key=lambda row: (row["choose"]["divergence"], row["name"])),
        }
        return PruningPolicy(
            scorer=chosen.scorer,
            scorer_args=chosen.scorer_args,
            selector=chosen.selector,
            selector_args=chosen.selector_args,
            keep=self.budgets[index],
            model=self.family.describe(),
            evidence=evidence,
        )


def _figures(candidate: Candidate, index: int, number: int, sums: dict[str, Tensor]) -> dict[str, Any]:
    """What one candidate did at one budget, in each part."""
    row: dict[str, Any] = {"name": candidate.name, "control": candidate.control}
    for part, name in enumerate(PARTS):
        count, agreed = int(sums["count"][part]), int(sums["agreed"][part, index, number])
        mean = float(sums["divergence"][part, index, number]) / count
        variance = max(0.0, float(sums["squares"][part, index, number]) / count - mean**2)
        row[name] = {
            "divergence": mean,
            "divergence_error": (variance / count) ** 0.5,
            "agreement": agreed / count,
            "interval": list(wilson_interval(agreed, count)),
        }
    return row


def _first_image(seen: Observation, visual: Tensor) -> Tensor:
    """The fingerprint of each sample's first image; 0 for a sample without one: int64 [B]."""
    images, counts = seen[Signal.FINGERPRINT], visual.sum(1) // seen.tokens
    first = counts.cumsum(0) - counts
    return torch.where(counts > 0, images[first.clamp(max=len(images) - 1)], 0)
