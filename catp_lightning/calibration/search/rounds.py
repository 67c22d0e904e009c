"""Rounds of a race: successive halving of candidates, at tokens or at prices."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from catp_lightning.calibration.fit.ties import Tolerance
from catp_lightning.calibration.passes import Belongs, Pass
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.calibration.search.candidate import Candidate
from catp_lightning.calibration.search.race import Race
from catp_lightning.calibration.search.standings import Round, Standings
from catp_lightning.calibration.search.sums import Rows
from catp_lightning.calibration.split import round_bounds, round_of
from catp_lightning.methods.components import Question

Found = tuple[Standings, list[list[int]]]
"""Standings of all candidates, and the indices of those that are left at each budget."""


@dataclass(frozen=True)
class Racing:
    """What all races of a calibration share.

    Attributes:
        plan: plan of the calibration.
        ties: divergences that differ by less are equal.
        belongs: says which samples are of the learning part.
        parts: number of samples in each part of the split.
        device: device of the sums.
        question: components of the question by which candidates may be routed; None: none are.
    """

    plan: Plan
    ties: Tolerance
    belongs: Belongs
    parts: dict[str, int]
    device: torch.device | None
    question: Question | None

    def run(
        self,
        cross_fitted: Sequence[Sequence[Candidate]],
        candidates: Sequence[Candidate],
        budgets: Sequence[int | float],
        alive: Sequence[Sequence[int]] | None = None,
        what: str = "candidates",
    ) -> Generator[Pass, None, Found]:
        """Yield the rounds in turn; in each, the worse candidates at each budget are left out.

        Args:
            cross_fitted: the candidates as fitted without each fold.
            candidates: the candidates.
            budgets: shares or numbers of tokens.
            alive: for each budget, the indices of the candidates that take part; None: all do at all budgets.
            what: what the candidates are called.
        """
        settings = self.plan.settings
        standings = Standings(candidates, self.ties, self.question)
        left = [list(range(len(candidates))) for _ in budgets] if alive is None else [list(some) for some in alive]
        bounds = round_bounds(self.parts["learn"], settings.first_round)
        for number in range(len(bounds)):
            if number:
                left = [standings.survivors(budget, left[budget], settings.eta) for budget in range(len(budgets))]
            title = f"round {number + 1} of {len(bounds)}, {max(map(len, left))} {what}"
            race = self.race(title, cross_fitted, budgets, left, number, bounds)
            yield race
            standings.rounds.append(Round(left, race.sums.compute(), race.answers.compute()))
        return standings, left

    def race(
        self,
        title: str,
        cross_fitted: Sequence[Sequence[Candidate]],
        budgets: Sequence[int | float],
        alive: Sequence[Sequence[int]],
        number: int,
        bounds: Sequence[float],
    ) -> Race:
        """Return the pass of round `number`, on the images that `bounds` give it."""

        def here(samples: Samples) -> Tensor:
            return self.belongs(samples) & (round_of(samples.images, bounds) == number)

        return Race(title, self.plan, cross_fitted, budgets, alive, here, self.parts, self.device, self.question)


def restricted(found: Found, budgets: Sequence[int]) -> Found:
    """Return a race at some of its budgets, given by their places."""
    standings, left = found
    rounds = [
        Round(
            [one.alive[at] for at in budgets],
            {name: values[list(budgets)] for name, values in one.sums.items()},
            [one.rows[at] for at in budgets],
        )
        for one in standings.rounds
    ]
    return replace(standings, rounds=rounds), [left[at] for at in budgets]


def joined(first: Found, second: Found, budgets: Sequence[int]) -> Found:
    """Return two races over the same samples as one.

    Args:
        first: standings at K' budgets, and who is left.
        second: the same of other candidates, at K budgets.
        budgets: for each budget of the second, its place among those of the first.
    """
    (one, left), (two, others) = first, second
    count, rounds = len(one.candidates), []
    for before, after in zip(one.rounds, two.rounds, strict=True):
        alive = [[*before.alive[at], *(count + n for n in some)] for at, some in zip(budgets, after.alive, strict=True)]
        sums = {name: np.concatenate([before.sums[name][list(budgets)], after.sums[name]], 1) for name in after.sums}
        rows = []
        for at, own in zip(budgets, after.rows, strict=True):
            known = before.rows[at]
            assert np.array_equal(known.images, own.images)  # both are sorted by the samples' checksums
            diverged = np.concatenate([known.divergence, own.divergence], 1)
            rows.append(Rows(own.images, own.questions, diverged, np.concatenate([known.agreed, own.agreed], 1)))
        rounds.append(Round(alive, sums, rows))
    candidates = [*one.candidates, *two.candidates]
    alive = [[*left[at], *(count + n for n in some)] for at, some in zip(budgets, others, strict=True)]
    return replace(one, candidates=candidates, rounds=rounds), alive
