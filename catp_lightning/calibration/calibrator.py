"""Calibration flow: probe, fit, compare candidates in rounds, check the chosen policies.

The split is divided by image. On the learning part, random subsets measure the value of tokens; candidates fitted to
these measurements compete with every fixed rule, and the worse ones are eliminated early. Both steps use the same
images, cross-fitted: the candidate that answers an image was fitted without the image's fold. Nothing is decided on the
checking part, so its figures are the ones to quote, and a promise is tested on it.
"""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from catp_lightning.calibration.fit.fitting import Fitted, fit, fit_without
from catp_lightning.calibration.fit.probing import Probing
from catp_lightning.calibration.fit.ties import Tolerance
from catp_lightning.calibration.passes import Stage
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.calibration.report.evidence import CalibrationResult
from catp_lightning.calibration.search.candidates import Candidate, default_candidates, fitted_candidates
from catp_lightning.calibration.search.promise import Promise
from catp_lightning.calibration.search.race import Check, Race
from catp_lightning.calibration.split import CHECKED, FOLDS, PROMISED, part_of, round_bounds, round_of
from catp_lightning.errors import PolicyError
from catp_lightning.methods.observation import Needs, Signal, join
from catp_lightning.policy import PruningPolicy, check_keep
from catp_lightning.utils.messages import rank_zero_warn

SURVIVORS = 4  # one in this many candidates goes on to the next round

NOTHING = 0.01
"""Floor, in nats, of the scale on which divergences are compared: below it relative differences are rounding noise."""


class Calibrator:
    """Calibration of one model: pass every batch of the split to `see`, call `finish`, repeat while it returns True.

    Args:
        plan: model family, and what is fitted and chosen among for it.
        budgets: shares or numbers of tokens; a candidate is chosen for each.
        promise: promise that the chosen budget has to keep; `budgets` must then be in descending order.
        device: device of the sums.

    Attributes:
        stage: current stage.

    Raises:
        PolicyError: a budget is not allowed or given twice, or there is none.
    """

    def __init__(
        self,
        plan: Plan,
        budgets: Sequence[int | float],
        promise: Promise | None = None,
        device: torch.device | None = None,
    ) -> None:
        for keep in budgets:
            check_keep(keep)
        if not budgets or len({(type(keep), keep) for keep in budgets}) < len(budgets):
            raise PolicyError(f"keep is {list(budgets)}; give one budget or several different ones.")
        self.plan, self.budgets, self.promise, self.device = plan, tuple(budgets), promise, device
        self.ties = Tolerance.under(plan.family.model.dtype)
        self._part_of = partial(part_of, checked=CHECKED if promise is None else PROMISED)
        self._probing = Probing(plan, budgets, self._part_of, device)
        self.stage: Stage = self._probing
        self.candidates: list[Candidate] = []
        self._unsound = torch.empty(0, dtype=torch.int64, device=device)
        self._bounds: list[float] = []
        self._rounds: list[Race] = []
        self._check: Check | None = None

    @property
    def needs(self) -> Needs:
        """Signals to observe before the decoder: those that candidates and the plan's voters read, and image hashes."""
        depth = self.plan.family.depth
        methods = [
            (rule.build_scorer(), rule.build_selector())
            for candidate in self._candidates(Fitted([0.0] * self.plan.slots))
            for rule in (candidate.policy(1.0),)
        ]
        entering = [(scorer, selector) for scorer, selector in methods if not scorer.stages(depth)]
        needs = [method.needs for both in entering for method in both]
        return join([{Signal.IMAGE_HASH: None}, self.plan.needs, *needs])

    def see(self, samples: Samples) -> None:
        """Add a batch to the current stage, without samples whose unpruned answer was found to be NaN or infinite."""
        sound = ~torch.isin(samples.keys, self._unsound)
        if sound.any():
            self.stage.see(samples if bool(sound.all()) else samples.where(sound))

    def finish(self) -> bool:
        """End the current stage, over all processes (each must call this), and return True if another stage follows.

        Raises:
            PolicyError: there are too few images for a choice or for the promise.
        """
        if self.stage is self._probing:
            self._fit()
        elif self.stage is self._check:
            return False
        else:
            self._reduced.append(self._rounds[-1].sums.compute())
        if len(self._rounds) < len(self._bounds):
            self._next_round()
        else:
            self._freeze()
        return True

    def _fit(self) -> None:
        probing = self._probing
        self.images, self.parts = probing.images.compute(), probing.parts.compute()
        self._unsound = probing.unsound.compute()
        unsound = (
            f" {len(self._unsound):,} samples were left out, to which the unpruned model's own answer is not a number "
            "(NaN or infinite): look for damaged pixels, broken weights, or too low a precision."
        )
        if not all(self.parts.values()):
            raise PolicyError(
                f"Calibration needs samples in every part of its split, got {self.parts}: give some dozens of images."
                f"{unsound if len(self._unsound) else ''}"
            )
        if len(self._unsound):
            rank_zero_warn(f"Calibration:{unsound}")
        if self.promise is not None:
            self.promise.check_images(int((self._part_of(self.images) == 1).sum()))
        found = {name: metric.compute() for name, metric in probing.correlations.items()}
        self.correlations = {name: matrix for name, matrix in found.items() if matrix.any()}
        sums, pairs = probing.sums.compute(), None if probing.pairs is None else probing.pairs.compute()
        self.fitted = fit(sums, pairs, probing.columns, self.ties)
        self.candidates = self._candidates(self.fitted)
        self._cross_fitted = [
            self._candidates(fit_without(fold, sums, pairs, probing.columns, self.fitted, self.ties))
            for fold in range(FOLDS)
        ]
        self.alive = [list(range(len(self.candidates))) for _ in self.budgets]
        self._bounds = round_bounds(self.parts["learn"])
        self._reduced: list[dict[str, np.ndarray]] = []

    def _candidates(self, fitted: Fitted) -> list[Candidate]:
        return [*default_candidates(self.plan), *fitted_candidates(self.plan, fitted)]

    def _next_round(self) -> None:
        number, rounds = len(self._rounds), len(self._bounds)
        if number:
            self.alive = [self._survivors(budget) for budget in range(len(self.budgets))]
        most = max(map(len, self.alive))
        title = f"round {number + 1} of {rounds}, {most} candidates"
        belongs = partial(self._in_round, number)
        self._rounds.append(Race(title, self.plan, self._cross_fitted, self.budgets, self.alive, belongs, self.device))
        self.stage = self._rounds[-1]

    def _in_round(self, number: int, images: Tensor) -> Tensor:
        return (self._part_of(images) == 0) & (round_of(images, self._bounds) == number)

    def _freeze(self) -> None:
        """Fix the choice for each budget and set up the checking stage, which only measures it."""
        self.chosen = [self._eligible(self._ranking(budget)) for budget in range(len(self.budgets))]
        references = [n for n, candidate in enumerate(self.candidates) if candidate.reference]
        alive = [[first, *(n for n in references if n != first)] for first in self.chosen]
        self._check = Check(self.plan, self.candidates, self.budgets, alive, self._checks, self.device)
        self.stage = self._check

    def _checks(self, images: Tensor) -> Tensor:
        return self._part_of(images) == 1

    def _survivors(self, budget: int) -> list[int]:
        if not self._reduced[-1]["count"].any():  # no image fell into that round
            return self.alive[budget]
        ranking = self._ranking(budget)
        return sorted({*ranking[: math.ceil(len(ranking) / SURVIVORS)], self._eligible(ranking)})

    def _eligible(self, ranking: Sequence[int]) -> int:
        """Return the first candidate of a ranking that may be chosen."""
        return next(number for number in ranking if self.candidates[number].eligible)

    def _ranking(self, budget: int) -> list[int]:
        """Return the remaining candidates at a budget, smallest mean divergence so far first; ties by name."""
        sums = self.choosing
        mean = sums["divergence"][budget] / np.maximum(1, sums["count"][budget])
        named = sorted(self.alive[budget], key=lambda n: self.candidates[n].name)
        return [named[place] for place in self.ties.order([float(mean[n]) for n in named], NOTHING)]

    @property
    def choosing(self) -> dict[str, np.ndarray]:
        """Candidate sums over all finished rounds, each [K, C]: K budgets, C candidates."""
        return {name: np.sum([sums[name] for sums in self._reduced], 0) for name in self._reduced[0]}

    def policies(self) -> list[PruningPolicy]:
        """Return a policy for each budget; with a promise, one policy, at the smallest budget that keeps it, or 1.0."""
        assert self._check is not None
        return CalibrationResult(
            model=self.plan.family.describe(),
            tokens=self._probing.tokens.compute(),
            budgets=self.budgets,
            promise=self.promise,
            candidates=self.candidates,
            chosen=self.chosen,
            choosing=self.choosing,
            checking=self._check.sums.compute(),
            drawn=self._check.drawn.compute(),
            alive=self._check.alive,
            by_image=self._check.by_image.compute(),
            parts=self.parts,
            images=self.images,
            fitted=self.fitted.evidence(self._probing.columns),
            correlations=self.correlations,
        ).policies()
