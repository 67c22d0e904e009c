"""Result of a calibration, and the policies with their evidence that it makes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from catp_lightning.calibration.asked import AskedImages
from catp_lightning.calibration.fit.texts import QuestionComponent
from catp_lightning.calibration.report.controls import paired_difference, verdict
from catp_lightning.calibration.report.evidence import (
    BestControl,
    CandidateRow,
    Figures,
    PromiseEvidence,
    RetentionPoint,
    amount,
)
from catp_lightning.calibration.search.candidate import Candidate
from catp_lightning.calibration.search.payments import Payments
from catp_lightning.calibration.search.promise import FixedSequence
from catp_lightning.calibration.search.promised import GroupResult, PromisedGroups
from catp_lightning.methods.budget import keep_count
from catp_lightning.methods.schedule import visits
from catp_lightning.metrics import wilson_interval
from catp_lightning.policy import PruningPolicy
from catp_lightning.policy.images import encode_images


@dataclass(frozen=True)
class CalibrationResult:
    """All measurements of a calibration, reduced over all processes.

    K budgets, C candidates, R candidates checked at a budget, I images, L layers.

    Attributes:
        model: description of the model that the policies are made for, from its family's `describe`.
        tokens: mean number of droppable visual tokens of an image.
        budgets: budgets in the user's order, shares or numbers of tokens; with a promise, in descending order.
        promised: promise that the chosen budget has to keep, with its groups; None: none was asked for.
        candidates: all candidates; other fields refer to them by their index.
        chosen: for each budget, index of the chosen candidate.
        choosing: sums over the rounds: `divergence`, `squares`, `agreed` and `count`, each [K, C].
        checking: the same sums over the checking part, on which nothing was decided.
        asked: questions about the images of the checking part, and the answers of each budget's choice to them.
        answered: of this process's samples of the checking part, checksums of image and question, int64 [N], and where
            each budget's choice gave the unpruned answer, bool [N, K].
        alive: for each budget, indices of the candidates that were checked, the chosen one first.
        by_image: for the checking part, number of questions about each image [I], and number of them to which each
            checked candidate gave the unpruned answer [I, K, R].
        perturbed: by perturbation, the sums of `checking` on the same samples with perturbed images.
        parts: number of samples in each part of the split.
        images: int64, fingerprints of all images.
        fitted: findings of the probes, as plain numbers.
        components: what the components of questions mean; none if all are alike, or nothing reads them.
        statistics: entries of the statistics, by name.
        payments: what policies cost; None if budgets are tokens.
        paid: the prices that were asked for, each met by one of `budgets` at the decoder's input alone.
    """

    model: Mapping[str, Any]
    tokens: float
    budgets: Sequence[int | float]
    promised: PromisedGroups | None
    candidates: Sequence[Candidate]
    chosen: Sequence[int]
    choosing: Mapping[str, np.ndarray]
    checking: Mapping[str, np.ndarray]
    asked: AskedImages
    answered: tuple[np.ndarray, np.ndarray]
    alive: Sequence[Sequence[int]]
    by_image: tuple[np.ndarray, np.ndarray]
    perturbed: Mapping[str, Mapping[str, np.ndarray]]
    parts: Mapping[str, int]
    images: Tensor
    fitted: Mapping[str, Any]
    components: Sequence[QuestionComponent]
    statistics: Mapping[str, Any]
    payments: Payments | None = None
    paid: Sequence[int | float] = ()

    def policies(self) -> list[PruningPolicy]:
        """Return a policy for each budget; with a promise, one policy, at the smallest budget that keeps it, or 1.0."""
        common = self._common()
        if self.promised is None:
            return [self._policy(budget, common) for budget in range(len(self.budgets))]
        results = self.promised.results(self.asked)
        walked = self.promised.walk(results)
        shown = {"promise": self._shown(self.promised, results, walked)}
        if walked.chosen is not None:
            return [self._policy(walked.chosen, {**common, **shown})]
        evidence = {"chosen": "no pruning", "control": False, **common, **shown, "candidates": []}
        whole = None if self.payments is None else {self.payments.unit: 1.0}
        return [PruningPolicy("position", keep=1.0, model=self.model, evidence=evidence, budget=whole)]

    def checked_answers(self, policy: PruningPolicy) -> tuple[np.ndarray, np.ndarray]:
        """Return checksums of this process's samples of the checking part, int64 [N], and where a policy agreed [N].

        Empty for a policy that keeps all tokens because no budget keeps a promise.
        """
        keys, agreed = self.answered
        asked = [repr(one) for one in (self.paid if self.payments else self.budgets)]
        if not policy.evidence["candidates"]:
            return keys[:0], agreed[:0, 0]
        return keys, agreed[:, asked.index(repr(amount(policy)))]

    def _policy(self, budget: int, common: Mapping[str, Any]) -> PruningPolicy:
        chosen = self.candidates[self.chosen[budget]]
        evidence = {
            "chosen": chosen.name,
            "control": chosen.control,
            **common,
            "candidates": self._rows(budget),
            **({"perturbed": self._perturbed(budget)} if self.perturbed else {}),
        }
        policy = chosen.policy(self.budgets[budget])
        if self.payments is None:
            return replace(policy, model=self.model, evidence=evidence)
        priced: dict[str, float] = {self.payments.unit: self.paid[budget]}
        return replace(policy, model=self.model, evidence=evidence | {"prices": self._prices(budget)}, budget=priced)

    def _prices(self, budget: int) -> dict[str, float]:
        """Return what the choice at a budget costs, by unit; none if budgets are tokens."""
        if self.payments is None:
            return {}
        return self.payments.of(self.candidates[self.chosen[budget]].policy(self.budgets[budget]))

    def _left(self, budget: int) -> int:
        """Return how many visual tokens of an image of mean size stay to the end."""
        chosen, total = self.candidates[self.chosen[budget]], round(self.tokens)
        if self.payments is not None:
            return visits(chosen.policy(self.budgets[budget]).steps(), total, self.payments.prices.depth)[-1]
        return 0 if chosen.scorer == "visual-exit" else keep_count(self.budgets[budget], total)

    def _common(self) -> dict[str, Any]:
        return {
            "samples": dict(self.parts),
            "tokens": round(self.tokens, 1),
            "images": encode_images(self.images),
            "retention": [self._retention(budget) for budget in range(len(self.budgets))],
            "fitted": dict(self.fitted),
            **({"components": self.components} if self.components else {}),
            **self.statistics,
        }

    def _retention(self, budget: int) -> RetentionPoint:
        """Return a point of the retention curve: agreement of a budget's choice on samples it was not chosen on."""
        figures = _figures(self.checking, budget, self.chosen[budget])
        assert figures is not None
        chosen = self.candidates[self.chosen[budget]]
        point: RetentionPoint = {
            "keep": self.paid[budget] if self.payments else self.budgets[budget],
            "tokens": self._left(budget),
            "chosen": chosen.name,
            "control": chosen.control,
            "agreement": figures["agreement"],
            "interval": figures["interval"],
            "best_control": self._best_control(budget),
        }
        return {**point, "prices": self._prices(budget)} if self.payments else point

    def _best_control(self, budget: int) -> BestControl | None:
        """Return the control that agreed most on the checking part, and the lead of the choice over it.

        None if no control was checked. Selecting the best of several controls on the same answers that are compared
        favours it a little, so a difference of 0 is slightly better than a draw for the choice.
        """
        questions, agreed = self.by_image
        controls = {
            place: self.candidates[number]
            for place, number in enumerate(self.alive[budget])
            if place and self.candidates[number].control
        }
        if not controls:
            return None
        best = max(controls, key=lambda place: (agreed[:, budget, place].sum(), -place))
        difference, interval = paired_difference(questions, agreed[:, budget, 0], agreed[:, budget, best])
        return {
            "name": controls[best].name,
            "agreement": float(agreed[:, budget, best].sum() / questions.sum()),
            "difference": difference,
            "interval": list(interval),
            "verdict": verdict(interval),
        }

    def _rows(self, budget: int) -> list[CandidateRow]:
        """Return a row for each candidate, sorted by samples answered (rounds survived), divergence and name."""
        rows: list[CandidateRow] = []
        for number, candidate in enumerate(self.candidates):
            choose, check = (_figures(sums, budget, number) for sums in (self.choosing, self.checking))
            if choose is None:  # a routing at another budget
                continue
            row: CandidateRow = {"name": candidate.name, "control": candidate.control, "choose": choose, "check": check}
            rows.append({**row, "inside": True} if candidate.alone else row)
        return sorted(rows, key=lambda row: (-row["choose"]["samples"], row["choose"]["divergence"], row["name"]))

    def _shown(
        self, promised: PromisedGroups, results: Sequence[GroupResult], walked: FixedSequence
    ) -> PromiseEvidence:
        """Return the promise and its tests; what it is over is said where it is not over images without groups."""
        promise = promised.promise
        shown: PromiseEvidence = {
            "max_disagreement": promise.max_disagreement,
            "confidence": promise.confidence,
            "images": len(np.unique(self.asked.images)),
            "steps": [
                {
                    "keep": keep,
                    "disagreed": step.disagreed,
                    "bound": step.bound,
                    "tested": step.tested,
                    "holds": step.holds,
                }
                for keep, step in zip(self.paid if self.payments else self.budgets, walked.steps, strict=True)
            ],
        }
        if self.payments is not None:
            shown["unit"] = self.payments.unit
        if promise.over != "images" or promise.group_by is not None:
            shown["over"] = promise.over
            shown["questions"] = int(self.asked.questions.sum())
            shown["most_questions"] = max(promised.most.values())
        if promise.group_by is not None:
            shown["group_by"] = promise.group_by
            shown["group_confidence"] = promised.each.confidence
            shown["groups"] = [
                {"name": of.name, "images": of.images, "questions": of.questions, "most_questions": of.most}
                for of in results
            ]
            for number, step in enumerate(shown["steps"]):
                step["groups"] = [
                    {"name": of.name, "disagreed": of.disagreed[number], "bound": of.bounds[number]} for of in results
                ]
        return shown

    def _perturbed(self, budget: int) -> dict[str, dict[str, Figures]]:
        """Return the figures of the checked candidates on perturbed images, by perturbation and candidate."""
        found: dict[str, dict[str, Figures]] = {name: {} for name in self.perturbed}
        for name, sums in self.perturbed.items():
            for number in self.alive[budget]:
                if (figures := _figures(sums, budget, number)) is not None:
                    found[name][self.candidates[number].name] = figures
        return found


def _figures(sums: Mapping[str, np.ndarray], budget: int, number: int) -> Figures | None:
    """Return the figures of one candidate at one budget; None if it answered no sample."""
    count = int(sums["count"][budget, number])
    if not count:
        return None
    agreed = int(sums["agreed"][budget, number])
    mean = float(sums["divergence"][budget, number]) / count
    variance = max(0.0, float(sums["squares"][budget, number]) / count - mean**2)
    return {
        "samples": count,
        "divergence": mean,
        "divergence_error": (variance / count) ** 0.5,
        "agreement": agreed / count,
        "interval": list(wilson_interval(agreed, count)),
    }
