"""Standings of the candidates in a race: who leads at a budget, and who goes on to the next round."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from catp_lightning.calibration.fit.ties import Tolerance
from catp_lightning.calibration.search.candidates import Candidate

NOTHING = 0.01
"""Floor, in nats, of the scale on which divergences are compared: below it relative differences are rounding noise."""


@dataclass
class Standings:
    """Sums of all rounds so far, and the order of the candidates that they give.

    Attributes:
        candidates: all C candidates; others refer to them by their index.
        ties: divergences that differ by less are equal, and go by name.
        rounds: sums of each round, `divergence`, `squares`, `agreed` and `count`, each [K, C]: K budgets.
    """

    candidates: Sequence[Candidate]
    ties: Tolerance
    rounds: list[Mapping[str, np.ndarray]] = field(default_factory=list)

    def sums(self) -> dict[str, np.ndarray]:
        """Return the sums over all rounds, by name, each [K, C]."""
        return {name: np.sum([sums[name] for sums in self.rounds], 0) for name in self.rounds[0]}

    def ranking(self, budget: int, alive: Sequence[int]) -> list[int]:
        """Return `alive` candidates at a budget, smallest mean divergence so far first; ties by name."""
        sums = self.sums()
        mean = sums["divergence"][budget] / np.maximum(1, sums["count"][budget])
        named = sorted(alive, key=lambda n: self.candidates[n].name)
        return [named[place] for place in self.ties.order([float(mean[n]) for n in named], NOTHING)]

    def survivors(self, budget: int, alive: Sequence[int], eta: int) -> list[int]:
        """Return one in `eta` of the candidates at a budget, the best, and the best that may be chosen; ascending.

        After a round into which no image fell all go on.
        """
        if not self.rounds[-1]["count"].any():
            return list(alive)
        ranking = self.ranking(budget, alive)
        return sorted({*ranking[: math.ceil(len(ranking) / eta)], self.choice(budget, alive)})

    def choice(self, budget: int, alive: Sequence[int]) -> int:
        """Return the first candidate at a budget that may be chosen."""
        return next(number for number in self.ranking(budget, alive) if self.candidates[number].eligible)
