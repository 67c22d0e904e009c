"""What a calibration found, as a policy records it: plain numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from catp_lightning.calibration.budget import Promise, Walk, walk
from catp_lightning.calibration.candidates import Candidate
from catp_lightning.calibration.controls import paired_difference, verdict
from catp_lightning.counts import keep_count
from catp_lightning.metrics import wilson_interval
from catp_lightning.overlap import encode_images
from catp_lightning.policy import PruningPolicy


@dataclass(frozen=True)
class CalibrationResult:
    """All that was measured, over all processes.

    Attributes:
        model: what the policies are made for, a family's `describe`.
        tokens: mean visual tokens of an image.
        budgets: in the user's order; in descending order with a promise.
        candidates: all of them, in one order.
        chosen: for each budget, which candidate.
        choosing: sums of the rounds, `divergence`, `squares`, `agreed` and `count`, each [K, C].
        checking: the same of the part that nothing was decided on.
        drawn: how many images that part has, and on how many of them each budget's choice disagrees: one question each.
        alive: for each budget the candidates that were checked, the chosen one first.
        by_image: of that part, questions of each image [I], and equal answers of those candidates [I, K, R].
        parts: samples in each part.
        images: int64, the fingerprints of all images.
        fitted: what the probes found.
        correlations: of the layers' rankings, by voter: [L, L].
    """

    model: Mapping[str, Any]
    tokens: float
    budgets: Sequence[int | float]
    promise: Promise | None
    candidates: Sequence[Candidate]
    chosen: Sequence[int]
    choosing: Mapping[str, np.ndarray]
    checking: Mapping[str, np.ndarray]
    drawn: tuple[int, list[int]]
    alive: Sequence[Sequence[int]]
    by_image: tuple[np.ndarray, np.ndarray]
    parts: Mapping[str, int]
    images: Tensor
    fitted: Mapping[str, Any]
    correlations: Mapping[str, np.ndarray]

    def policies(self) -> list[PruningPolicy]:
        """A policy for each budget; with a promise one, at the smallest budget that keeps it."""
        common = self._common()
        if self.promise is None:
            return [self._policy(budget, common) for budget in range(len(self.budgets))]
        walked = walk(self.promise, self.drawn[1], self.drawn[0])
        shown = {"promise": {**asdict(self.promise), "images": self.drawn[0], "steps": self._steps(walked)}}
        if walked.chosen is not None:
            return [self._policy(walked.chosen, {**common, **shown})]
        evidence = {"chosen": "no pruning", "control": False, **common, **shown, "candidates": []}
        return [PruningPolicy("position", keep=1.0, model=self.model, evidence=evidence)]

    def _policy(self, budget: int, common: Mapping[str, Any]) -> PruningPolicy:
        chosen = self.candidates[self.chosen[budget]]
        evidence = {
            "chosen": chosen.name,
            "control": chosen.control,
            **common,
            "candidates": self._rows(budget),
        }
        return replace(chosen.policy(self.budgets[budget]), model=self.model, evidence=evidence)

    def _common(self) -> dict[str, Any]:
        return {
            "samples": dict(self.parts),
            "tokens": round(self.tokens, 1),
            "images": encode_images(self.images),
            "retention": [self._retention(budget) for budget in range(len(self.budgets))],
            "fitted": dict(self.fitted),
            "rank_correlation": {name: matrix.round(4).tolist() for name, matrix in self.correlations.items()},
        }

    def _retention(self, budget: int) -> dict[str, Any]:
        """A point of the retention curve: what each budget's choice keeps, on samples it was not chosen on."""
        figures = _figures(self.checking, budget, self.chosen[budget])
        assert figures is not None
        chosen = self.candidates[self.chosen[budget]]
        return {
            "keep": self.budgets[budget],
            "tokens": 0 if chosen.scorer == "visual-exit" else keep_count(self.budgets[budget], round(self.tokens)),
            "chosen": chosen.name,
            "control": chosen.control,
            "agreement": figures["agreement"],
            "interval": figures["interval"],
            "best_control": self._best_control(budget),
        }

    def _best_control(self, budget: int) -> dict[str, Any] | None:
        """The control that agreed most on the checking part, and how far the choice is ahead of it; None: none was.

        The best of several controls on the very answers that are compared is a little lucky: a difference of 0 is
        more than a draw for the choice.
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

    def _rows(self, budget: int) -> list[dict[str, Any]]:
        """A row for each candidate, best first: who stayed longer is before who left earlier."""
        rows = []
        for number, candidate in enumerate(self.candidates):
            row: dict[str, Any] = {"name": candidate.name, "control": candidate.control}
            row["choose"] = _figures(self.choosing, budget, number)
            row["check"] = _figures(self.checking, budget, number)
            rows.append(row)
        return sorted(rows, key=lambda row: (-row["choose"]["samples"], row["choose"]["divergence"], row["name"]))

    def _steps(self, walked: Walk) -> list[dict[str, Any]]:
        return [{"keep": keep, **asdict(step)} for keep, step in zip(self.budgets, walked.steps, strict=True)]


def _figures(sums: Mapping[str, np.ndarray], budget: int, number: int) -> dict[str, Any] | None:
    """What one candidate did at one budget; None where it did not answer."""
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
