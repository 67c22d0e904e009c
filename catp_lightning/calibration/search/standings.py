"""Standings of the candidates in a race: who leads at a budget, who goes on to the next round, who is chosen."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from catp_lightning.calibration.fit.ties import Tolerance
from catp_lightning.calibration.search.candidate import Candidate, Routing
from catp_lightning.calibration.search.choice import NOTHING, choose
from catp_lightning.calibration.search.routes import complements, routes, weights
from catp_lightning.calibration.search.sums import Rows
from catp_lightning.calibration.split import fold_of
from catp_lightning.methods.components import Question


@dataclass
class Round:
    """Findings of one round of a race.

    Attributes:
        alive: for each of K budgets, the indices of the candidates that answered.
        sums: `divergence`, `squares`, `agreed` and `count`, each [K, C].
        rows: for each budget, the answers of these candidates to every sample.
    """

    alive: Sequence[Sequence[int]]
    sums: Mapping[str, np.ndarray]
    rows: Sequence[Rows]


@dataclass
class Standings:
    """Answers of all rounds so far, and the order of the candidates that they give.

    Attributes:
        candidates: all C candidates; others refer to them by their index.
        ties: divergences that differ by less are equal, and go by name.
        question: components of the question by which candidates may be routed; None: none are.
        rounds: the rounds so far.
    """

    candidates: Sequence[Candidate]
    ties: Tolerance
    question: Question | None = None
    rounds: list[Round] = field(default_factory=list)

    def sums(self) -> dict[str, np.ndarray]:
        """Return the sums over all rounds, by name, each [K, C]."""
        return {name: np.sum([one.sums[name] for one in self.rounds], 0) for name in self.rounds[0].sums}

    def rows(self, budget: int, alive: Sequence[int]) -> Rows:
        """Return the answers of candidates that are `alive` to the samples of all rounds so far, in this order."""
        parts = [(one.rows[budget], list(one.alive[budget])) for one in self.rounds]
        return Rows.joined([rows.of([known.index(number) for number in alive]) for rows, known in parts])

    def ranking(self, budget: int, alive: Sequence[int]) -> list[int]:
        """Return `alive` candidates at a budget, smallest mean divergence so far first; ties by name."""
        sums = self.sums()
        mean = sums["divergence"][budget] / np.maximum(1, sums["count"][budget])
        named = sorted(alive, key=lambda n: self.candidates[n].name)
        return [named[place] for place in self.ties.order([float(mean[n]) for n in named], NOTHING)]

    def survivors(self, budget: int, alive: Sequence[int], eta: int) -> list[int]:
        """Return the candidates at a budget that go on, ascending.

        They are one in `eta`, the best; the one that would be chosen; the best rule without fitted parts; and those
        that are best for some questions. After a round into which no image fell all go on.
        """
        if not alive or not self.rounds[-1].sums["count"].any():
            return list(alive)
        ranking = self.ranking(budget, alive)
        eligible, routable = self._eligible(ranking)
        plain = [number for number in eligible if not self.candidates[number].fitted]
        going = {*ranking[: math.ceil(len(ranking) / eta)], self.choice(budget, alive), *plain[:1]}
        if self.question is not None and routable:
            going |= {routable[place] for place in complements(self.rows(budget, routable), 0)}
        return sorted(going)

    def choice(self, budget: int, alive: Sequence[int]) -> int:
        """Return the candidate to choose at a budget among those that may be chosen."""
        eligible, _ = self._eligible(self.ranking(budget, alive))
        rows = self.rows(budget, eligible)
        if not len(rows.images):
            return eligible[0]
        some = [self.candidates[number] for number in eligible]
        return eligible[choose(some, rows.divergence, rows.images, self.ties)]

    def best_alone(self, budget: int) -> list[int]:
        """Return the best candidate that drops tokens at one place inside the decoder and nowhere else; [] if none ran.

        It is checked beside the choice, so that a schedule is compared with the best of such rules.
        """
        sums = self.sums()
        ran = [n for n, one in enumerate(self.candidates) if one.alone and sums["count"][budget, n]]
        return self.ranking(budget, ran)[:1]

    def _eligible(self, ranking: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the candidates of a ranking that may be chosen, and those of them that questions may be routed to."""
        eligible = [number for number in ranking if self.candidates[number].eligible]
        return eligible, [number for number in eligible if self.candidates[number].routable]

    def final(self, alive: Sequence[Sequence[int]], folds: int) -> "Final":
        """Return the candidates to choose after the last round, among them routings of questions that are worth it.

        Args:
            alive: for each budget, the indices of the candidates of the last round.
            folds: number of folds.
        """
        candidates, sums, chosen = list(self.candidates), self.sums(), []
        for budget, some in enumerate(alive):
            number, routed = self.choice(budget, some), self._routing(budget, some, folds)
            if routed is not None:
                number = len(candidates)
                candidates.append(routed[0])
                sums = with_candidate(sums, budget, routed[1])
            chosen.append(number)
        return Final(candidates, chosen, sums)

    def _routing(self, budget: int, alive: Sequence[int], folds: int) -> tuple[Routing, Rows] | None:
        """Return a routing of questions between candidates and its answers, each predicted without the sample's fold.

        None if it would not be chosen.
        """
        eligible, routable = self._eligible(self.ranking(budget, alive))
        if self.question is None or not routable or not len(self.rows(budget, routable).images):
            return None
        first = self.choice(budget, routable)
        several = [first, *(number for number in routable if number != first)]
        rows, every = self.rows(budget, several), self.rows(budget, eligible)
        places, taken = routes(rows, fold_of(torch.from_numpy(rows.images), folds).numpy(), 0)
        if len(places) < 2:
            return None
        members = [self.candidates[several[place]] for place in places]
        routing = Routing.of(members, self.question, weights(rows.of(places)))
        samples = np.arange(len(taken))[:, None], taken[:, None]
        own = Rows(rows.images, rows.questions, rows.divergence[samples], rows.agreed[samples])
        together = np.concatenate([every.divergence, own.divergence], 1)
        candidates = [*(self.candidates[number] for number in eligible), routing]
        wins = choose(candidates, together, rows.images, self.ties) == len(eligible)
        return (routing, own) if wins else None


@dataclass(frozen=True)
class Final:
    """Outcome of a race.

    Attributes:
        candidates: all candidates, routings last.
        chosen: for each budget, the index of the chosen candidate.
        sums: sums over the rounds, by name, each [K, C]; a routing has answered at its own budget.
        compared: candidates that are to be checked beside the chosen ones, whatever their rank.
    """

    candidates: Sequence[Candidate]
    chosen: Sequence[int]
    sums: Mapping[str, np.ndarray]
    compared: Sequence[int] = ()


def with_candidate(sums: Mapping[str, np.ndarray], budget: int, rows: Rows) -> dict[str, np.ndarray]:
    """Return sums with one more candidate, which has answered at one budget."""
    found = {name: np.pad(values, ((0, 0), (0, 1))) for name, values in sums.items()}
    found["divergence"][budget, -1] = rows.divergence.sum()
    found["squares"][budget, -1] = (rows.divergence**2).sum()
    found["agreed"][budget, -1] = int(rows.agreed.sum())
    found["count"][budget, -1] = len(rows.images)
    return found
