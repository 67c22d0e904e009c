"""Comparison of methods on one set of questions: accuracy, agreement with the unpruned model, tokens kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

RESAMPLES = 2000

Measure = Literal["accuracy", "agreement"]
MEASURES: dict[Measure, str] = {"accuracy": "VQA accuracy", "agreement": "agreement with the unpruned model"}


@dataclass(frozen=True)
class Result:
    """Result of one method at one budget, for each of N questions.

    Attributes:
        method: name of the method; several results of one name and budget are draws of one method (seeds, or
            calibrations on different data) and are averaged question by question.
        keep: the budget; None: unpruned.
        score: float [N], accuracy of each question, in [0, 1], by the rule of its data set; None where it was not
            measured.
        same: float [N], 1 where the answer is the unpruned model's, otherwise 0.
        tokens: mean number of visual tokens kept.
        tokens_per_layer: mean number of visual tokens that a layer of the decoder reads; None: as many as are kept.
        budget: the price at which it is compared, {"prefill_flops": 0.25}, in place of `keep`; None: `keep`.
        schedule: where tokens leave and how many stay, in a few words.
        prices: what the run paid, as shares of what the unpruned model pays, by unit; None: not counted.
        figures: what the data set reports beside the mean of `score`, by name: "pope_f1".
        seconds: how long answering all questions took; None: not measured.
    """

    method: str
    keep: int | float | None
    score: np.ndarray | None
    same: np.ndarray
    tokens: float
    tokens_per_layer: float | None = None
    budget: Mapping[str, float] | None = None
    schedule: str = ""
    prices: Mapping[str, float] | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None

    @property
    def at(self) -> str:
        """What it is compared at, as text: 1 and 1.0 are two budgets."""
        return repr(self.keep if self.budget is None else dict(self.budget))

    @property
    def unpruned(self) -> bool:
        return self.keep is None and self.budget is None


@dataclass
class Comparison:
    """Results of several methods on the same N questions.

    Attributes:
        images: [N], the image each question is about: intervals resample images, for questions about one image are not
            independent samples.
        reference: the method the others are compared with.
        results: results of the methods, several for one that has several draws.
    """

    images: Sequence[int]
    reference: str
    results: list[Result] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each method and budget.

        A row has means, 95% bootstrap intervals, how far the reference is ahead in agreement, and `accuracy_change`,
        how far its accuracy is above that of the unpruned model, both paired by question.
        Where a method has several draws, intervals resample them as well as images, and `agreement_draws`
        (`accuracy_draws`) has the mean of each.
        """
        merged: dict[tuple[str, str], list[Result]] = {}
        for result in self.results:
            merged.setdefault((result.method, result.at), []).append(result)
        weights = self._resamples()
        groups = {key: _Draws.of(several, weights, number) for number, (key, several) in enumerate(merged.items())}
        return [self._row(draws, groups) for draws in groups.values()]

    def _row(self, draws: "_Draws", groups: Mapping[tuple[str, str], "_Draws"]) -> dict[str, Any]:
        mean = draws.results[0]
        row: dict[str, Any] = {"method": mean.method, "keep": mean.keep}
        if mean.budget is not None:
            row = {"method": mean.method, "budget": dict(mean.budget)}
            row["schedules"] = [result.schedule for result in draws.results]
        paid = [result.prices for result in draws.results if result.prices is not None]
        if paid:
            row["prices"] = {unit: float(np.mean([one[unit] for one in paid])) for unit in paid[0]}
        row["tokens"] = float(np.mean([result.tokens for result in draws.results]))
        per_layer = [result.tokens_per_layer for result in draws.results if result.tokens_per_layer is not None]
        if per_layer:
            row["tokens_per_layer"] = float(np.mean(per_layer))
        if mean.figures:
            every = [result.figures for result in draws.results]
            row["figures"] = {name: float(np.mean([one[name] for one in every])) for name in mean.figures}
        seconds = [result.seconds for result in draws.results if result.seconds is not None]
        if seconds:
            row["seconds"] = float(np.mean(seconds))
        for measure, means, resampled in (
            ("accuracy", draws.accuracy, draws.resampled_accuracy),
            ("agreement", draws.agreement, draws.resampled_agreement),
        ):
            if means is not None and resampled is not None:
                row |= {measure: float(np.mean(means)), f"{measure}_interval": _interval(resampled.clip(0, 1))}
                row |= {f"{measure}_draws": means} if len(means) > 1 else {}
        reference = groups.get((self.reference, mean.at))
        if reference is not None and mean.method != self.reference:
            row["reference_ahead"] = float(np.mean(reference.agreement) - np.mean(draws.agreement))
            row["reference_ahead_interval"] = _interval(reference.resampled_agreement - draws.resampled_agreement)
        full = next((group for group in groups.values() if group.results[0].unpruned), None)
        if full is not None and full is not draws and full.accuracy is not None and draws.accuracy is not None:
            assert full.resampled_accuracy is not None
            assert draws.resampled_accuracy is not None
            row["accuracy_change"] = float(np.mean(draws.accuracy) - np.mean(full.accuracy))
            row["accuracy_change_interval"] = _interval(draws.resampled_accuracy - full.resampled_accuracy)
        return row

    def _resamples(self) -> np.ndarray:
        """Return weights of the questions in each bootstrap resample of images: float [RESAMPLES, N], rows sum to 1."""
        _, image = np.unique(np.asarray(self.images), return_inverse=True)
        count = image.max() + 1
        drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES)
        weights = drawn[:, image].astype(float)
        return weights / weights.sum(1, keepdims=True)


@dataclass(frozen=True)
class _Draws:
    """Draws of one method at one budget: the mean of each, and bootstrap means that resample images and draws.

    Attributes:
        results: one result for each draw.
        agreement, accuracy: the mean of each draw; accuracy is None where it was not measured.
        resampled_agreement, resampled_accuracy: float [RESAMPLES], weighted means over draws and questions.
    """

    results: Sequence[Result]
    agreement: list[float]
    resampled_agreement: np.ndarray
    accuracy: list[float] | None
    resampled_accuracy: np.ndarray | None

    @classmethod
    def of(cls, results: Sequence[Result], weights: np.ndarray, number: int) -> "_Draws":
        """Resample results of one method and budget; `weights` of questions: float [RESAMPLES, N], `number`: a seed."""
        shares = _draw_shares(len(results), number)

        def resampled(values: Sequence[np.ndarray]) -> np.ndarray:
            return np.asarray((shares * (weights @ np.stack(values, 1))).sum(1))

        same = [result.same for result in results]
        scores = [result.score for result in results if result.score is not None]
        return cls(
            results,
            [float(one.mean()) for one in same],
            resampled(same),
            [float(one.mean()) for one in scores] if len(scores) == len(results) else None,
            resampled(scores) if len(scores) == len(results) else None,
        )


def _draw_shares(draws: int, number: int) -> np.ndarray:
    """Return the share of each draw in each resample: float [RESAMPLES, draws], rows sum to 1; `number` is the seed.

    Deviations from equal shares are enlarged by sqrt(n / (n - 1)): a bootstrap of few draws understates their variance
    by that much.
    """
    if draws == 1:
        return np.ones((RESAMPLES, 1))
    drawn = np.random.default_rng([1, number]).multinomial(draws, np.full(draws, 1 / draws), RESAMPLES) / draws
    return np.asarray(1 / draws + (draws / (draws - 1)) ** 0.5 * (drawn - 1 / draws))


def _interval(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.quantile(values, [0.025, 0.975])]
