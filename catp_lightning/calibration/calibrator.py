"""Compares candidate policies with the unpruned model, batch by batch, and picks one for each budget."""

from collections.abc import Sequence
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor

from catp_lightning.calibration.candidates import Candidate
from catp_lightning.calibration.replay import Replay, agreement, divergence
from catp_lightning.calibration.statistics import PARTS, CandidateSums, part_of
from catp_lightning.choosing import choose_tokens, score_tokens, visual_tokens
from catp_lightning.errors import PolicyError
from catp_lightning.families import Family
from catp_lightning.observation import Needs, Observation, Signal, join
from catp_lightning.policy import PruningPolicy, check_keep


class Calibrator:
    """Adds up what every candidate would have done; `policies` decides.

    Args:
        family: of the model that is calibrated.
        candidates: rules to compare; names are unique.
        budgets: shares or numbers of tokens, each with a choice of its own.
    """

    def __init__(self, family: Family, candidates: Sequence[Candidate], budgets: Sequence[float | int]) -> None:
        for keep in budgets:
            check_keep(keep)
        if not budgets or len({(type(keep), keep) for keep in budgets}) < len(budgets):
            raise PolicyError(f"keep is {list(budgets)}; give one budget or several different ones.")
        if len({candidate.name for candidate in candidates}) < len(candidates) or not candidates:
            raise PolicyError("Candidates need names of their own, and there must be at least one.")
        self.family, self.candidates, self.budgets = family, tuple(candidates), tuple(budgets)
        self.rules = [candidate.policy(budgets[0]) for candidate in candidates]
        self.scorers = [rule.build_scorer() for rule in self.rules]
        self.selectors = [rule.build_selector() for rule in self.rules]
        self.sums = CandidateSums(len(self.budgets), len(self.candidates))

    @property
    def needs(self) -> Needs:
        """The signals all candidates read together."""
        split: Needs = {Signal.FINGERPRINT: None}
        return join(
            [split, *(scorer.needs for scorer in self.scorers), *(selector.needs for selector in self.selectors)]
        )

    def update(self, replay: Replay, seen: Observation) -> None:
        """Answer one batch again under every candidate at every budget.

        Args:
            replay: the prompts and the unpruned answers.
            seen: what `needs` names, of the same batch.
        """
        visual, valid = visual_tokens(replay.visual), replay.answers.valid
        full = replay.log_probabilities(visual)
        scores = {scorer: score_tokens(scorer, seen, visual) for scorer in dict.fromkeys(self.scorers)}
        diverged, agreed = [], []
        for keep in self.budgets:
            for scorer, selector in zip(self.scorers, self.selectors, strict=True):
                chosen, _ = choose_tokens(scores[scorer], selector, keep, seen, visual)
                pruned = replay.log_probabilities(chosen)
                diverged.append(divergence(full, pruned, valid))
                agreed.append(agreement(full, pruned, valid))
        shape = (len(self.budgets), len(self.candidates), len(visual))
        part = part_of(_first_image(seen[Signal.FINGERPRINT], visual, seen.tokens))
        self.sums.update(part, torch.stack(diverged).view(shape), torch.stack(agreed).view(shape))

    def policies(self) -> list[PruningPolicy]:
        """A policy for each budget: the candidate with the smallest mean divergence on the choosing part.

        Its figures on the other part are those to quote: no candidate was picked for them.

        Raises:
            PolicyError: no sample was seen, or all fell in one part.
        """
        sums = self.sums.compute()
        if not bool((sums["count"] > 0).all()):
            count = dict(zip(PARTS, sums["count"].tolist(), strict=True))
            raise PolicyError(
                f"Calibration needs samples in both of its parts, got {count}. Give it at least some dozens of images."
            )
        return [self._policy(index, keep, sums) for index, keep in enumerate(self.budgets)]

    def _policy(self, index: int, keep: float | int, sums: dict[str, Tensor]) -> PruningPolicy:
        rows = [self._figures(index, number, sums) for number in range(len(self.candidates))]
        best = min(range(len(rows)), key=lambda n: (rows[n]["choose"]["divergence"], rows[n]["name"]))
        chosen = self.candidates[best]
        evidence = {
            "chosen": chosen.name,
            "control": chosen.control,
            "samples": dict(zip(PARTS, sums["count"].tolist(), strict=True)),
            "candidates": sorted(rows, key=lambda row: (row["choose"]["divergence"], row["name"])),
        }
        return PruningPolicy(
            scorer=chosen.scorer,
            scorer_args=chosen.scorer_args,
            selector=chosen.selector,
            selector_args=chosen.selector_args,
            keep=keep,
            model=self.family.describe(),
            evidence=evidence,
        )

    def _figures(self, index: int, number: int, sums: dict[str, Tensor]) -> dict[str, Any]:
        candidate = self.candidates[number]
        row: dict[str, Any] = {"name": candidate.name, "control": candidate.control}
        for part, name in enumerate(PARTS):
            count, agreed = int(sums["count"][part]), int(sums["agreed"][part, index, number])
            mean = float(sums["divergence"][part, index, number]) / count
            variance = max(0.0, float(sums["squares"][part, index, number]) / count - mean**2)
            interval = binomtest(agreed, count).proportion_ci(0.95, "wilson")
            row[name] = {
                "divergence": mean,
                "divergence_error": (variance / count) ** 0.5,
                "agreement": agreed / count,
                "interval": [interval.low, interval.high],
            }
        return row


def _first_image(images: Tensor, visual: Tensor, tokens: int) -> Tensor:
    """The fingerprint of each sample's first image; 0 for a sample without one: int64 [I] -> int64 [B]."""
    counts = visual.sum(1) // tokens
    first = counts.cumsum(0) - counts
    return torch.where(counts > 0, images[first.clamp(max=len(images) - 1)], 0)
