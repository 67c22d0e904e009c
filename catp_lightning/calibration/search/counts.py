"""Counts by question: how many tokens each question gets, from what answers lose around the budget."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from catp_lightning.calibration.passes import Belongs, Pass
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.search.candidate import Candidate, Counting, Routing
from catp_lightning.calibration.search.choice import LEVEL, paired
from catp_lightning.calibration.search.race import Race
from catp_lightning.calibration.search.standings import Final, with_candidate
from catp_lightning.calibration.search.sums import Rows
from catp_lightning.calibration.split import fold_of
from catp_lightning.methods.budget import keep_count
from catp_lightning.methods.components import Question
from catp_lightning.methods.counts import MOST

STEPS = tuple(MOST ** (step / 4) for step in range(-4, 5))
"""Multiples of a budget at which answers are measured."""

RIDGE = 3.0
"""Ridge penalty of the regression on the question, in samples."""

SLOPE = 0.25
"""Least exponent by which the loss falls with the number of tokens."""

ITERATIONS = 50


@dataclass(frozen=True)
class Curves:
    """Answers of one candidate to N samples at K numbers of tokens.

    Attributes:
        counts: int64 [K], numbers of tokens of an image of mean size, ascending.
        budget: the place in `counts` of the budget.
        tokens: number of tokens of an image of mean size.
        images: int64 [N], fingerprint of each sample's image.
        questions: float64 [N, C], components of its question.
        divergence: float64 [N, K], in nats.
        agreed: float64 [N, K], 1 where the answer is the unpruned one.
    """

    counts: np.ndarray
    budget: int
    tokens: int
    images: np.ndarray
    questions: np.ndarray
    divergence: np.ndarray
    agreed: np.ndarray

    @classmethod
    def of(cls, keep: int | float, tokens: int, rows: dict[int, Rows]) -> "Curves":
        """Return the curves around a budget from answers by number of tokens; those are of one candidate."""
        counts, several = sorted(rows), [rows[count] for count in sorted(rows)]
        joined = (np.concatenate([getattr(part, name) for part in several], 1) for name in ("divergence", "agreed"))
        budget = counts.index(keep_count(keep, tokens))
        return cls(np.array(counts), budget, tokens, several[0].images, several[0].questions, *joined)

    def weights(self, here: np.ndarray, measured: bool = False) -> np.ndarray:
        """Return the weights of `Counts` from some of the samples: float64 [C + 1].

        Args:
            here: bool [N], the samples.
            measured: True: the mean of the nearest numbers in `counts` is to be the budget, instead of the counts' own.
        """
        hardness, slope = loss_by_question(self.questions[here], self.counts, self.divergence[here])
        logarithms = self.questions[here] @ hardness / (1 + slope)
        reach = 2 * np.log(MOST) + np.abs(logarithms).max()
        low, high = -reach, reach
        for _ in range(ITERATIONS):
            constant = (low + high) / 2
            counts = self.counts[self._nearest(logarithms + constant)] if measured else self._own(logarithms + constant)
            low, high = (constant, high) if counts.mean() <= self.counts[self.budget] else (low, constant)
        return np.append(hardness / (1 + slope), low)

    def steps(self, weights: np.ndarray, here: np.ndarray) -> np.ndarray:
        """Return the place in `counts` that is nearest to what each of some samples would keep: int64 [n]."""
        return self._nearest(self.questions[here] @ weights[:-1] + weights[-1])

    def _own(self, logarithms: np.ndarray) -> np.ndarray:
        """Return the numbers of tokens that samples keep under logarithms of multiples of the budget: float64 [n]."""
        multiples = np.exp(logarithms.clip(-np.log(MOST), np.log(MOST)))
        return np.floor(self.counts[self.budget] * multiples + 0.5).clip(1, self.tokens)

    def _nearest(self, logarithms: np.ndarray) -> np.ndarray:
        return np.abs(np.log(self._own(logarithms))[:, None] - np.log(self.counts)).argmin(1)


def loss_by_question(questions: np.ndarray, counts: np.ndarray, divergence: np.ndarray) -> tuple[np.ndarray, float]:
    """Fit loss(q, n) = exp(h . q + c) n^-b by Poisson regression, ridge on h: it weighs losses as they count in a mean.

    Args:
        questions: float64 [N, C], components of the questions.
        counts: int64 [K], numbers of tokens.
        divergence: float64 [N, K], losses, at least 0.

    Returns:
        h, float64 [C], and b, at least `SLOPE`.
    """
    samples, several = divergence.shape
    design = np.c_[
        np.repeat(questions, several, 0), np.tile(-np.log(counts), samples), np.ones(samples * several, dtype=float)
    ]
    target = divergence.clip(min=0).ravel()
    means = divergence.mean(0).clip(min=1e-9)
    dispersion = float(((divergence - means) ** 2 / means).mean())  # a loss varies by so much more than Poisson's
    penalty = np.full(design.shape[1], max(RIDGE * several * dispersion, 1e-6))
    penalty[-2:] = 1e-6  # neither the slope nor the mean is shrunk
    found = np.zeros(design.shape[1])
    found[-1] = np.log(target.mean() + 1e-9)

    def objective(weights: np.ndarray) -> float:
        logarithms = (design @ weights).clip(-30, 10)
        return float((np.exp(logarithms) - target * logarithms).sum() + (penalty * weights**2).sum() / 2)

    now = objective(found)
    for _ in range(ITERATIONS):  # Newton's method; the objective is convex
        predicted = np.exp((design @ found).clip(-30, 10))
        gradient = design.T @ (predicted - target) + penalty * found
        curvature = (design * predicted[:, None]).T @ design + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        while (after := objective(found - step)) > now and np.abs(step).max() > 1e-9:
            step /= 2
        found, before, now = found - step, now, after
        if before - now <= 1e-10 * abs(before):
            break
    return found[:-2], max(SLOPE, float(found[-2]))


def allocate(
    plan: Plan,
    final: Final,
    by_fold: Sequence[Sequence[Candidate]],
    budgets: Sequence[int | float],
    tokens: int,
    belongs: Belongs,
    parts: dict[str, int],
    question: Question,
    device: torch.device | None,
) -> Generator[Pass, None, Final]:
    """Measure the chosen candidates around their budgets, and choose counts by question where they lose less.

    Args:
        plan: plan of the calibration.
        final: the candidates that were chosen.
        by_fold: for each fold all candidates but routings, fitted without it.
        budgets: the budget of each choice.
        tokens: mean number of droppable tokens of an image.
        belongs: says which samples are measured.
        parts: number of samples in each part of the split.
        question: components of a question.
        device: device of the sums.

    Returns:
        The same, with further candidates where those are ahead, at an equal mean of tokens, by more than one standard
        error out of fold.
    """
    ladders = [
        {} if final.candidates[number].method.scorer.stages(plan.family.depth) else _ladder(keep, tokens)
        for keep, number in zip(budgets, final.chosen, strict=True)
    ]
    asked = {(type(keep), keep): keep for ladder in ladders for keep in ladder.values()}
    if not asked:
        return final
    alive = [
        sorted({number for number, ladder in zip(final.chosen, ladders, strict=True) if keep in ladder.values()})
        for keep in asked.values()
    ]
    several = [[*own, *_routings(final.candidates, own)] for own in by_fold]
    title = f"how many tokens each question needs, at {len(asked)} budgets"
    race = Race(title, plan, several, list(asked.values()), alive, belongs, parts, device, question)
    yield race
    answers = dict(zip(asked, zip(race.answers.compute(), alive, strict=True), strict=True))
    for budget, (keep, number, ladder) in enumerate(zip(budgets, final.chosen, ladders, strict=True)):
        found = ((count, *answers[type(at), at]) for count, at in ladder.items())
        rows = {count: every.of([known.index(number)]) for count, every, known in found}
        if rows and len(rows[keep_count(keep, tokens)].images):
            final = _chosen(final, budget, Curves.of(keep, tokens, rows), question, plan.settings.folds)
    return final


def _ladder(keep: int | float, tokens: int) -> dict[int, int | float]:
    """Return the budgets around one at which candidates are measured, by their numbers of tokens; at least two or none.

    >>> {count: round(budget, 3) for count, budget in _ladder(0.5, 8).items()}, _ladder(1, 4)
    ({4: 0.5, 1: 0.125, 2: 0.177, 3: 0.354, 6: 0.707}, {1: 1, 2: 2, 3: 3})
    """
    found = {keep_count(keep, tokens): keep}
    for step in STEPS:
        at = keep * step if isinstance(keep, float) else max(1, round(keep * step))
        if not isinstance(at, float) or at < 1:
            found.setdefault(keep_count(at, tokens), at)
    found = {count: at for count, at in found.items() if count < tokens}
    return found if keep_count(keep, tokens) in found and len(found) > 1 else {}


def _routings(candidates: Sequence[Candidate], own: Sequence[Candidate]) -> list[Candidate]:
    """Return the routings at the end of `candidates` with the rules of one fold, `own`, in place of theirs."""
    rules = [(one.scorer, one.scorer_args, one.selector, one.selector_args) for one in candidates]
    found: list[Candidate] = []
    for number in range(len(own), len(candidates)):
        routing = candidates[number]
        assert isinstance(routing, Routing)
        first = own[rules.index(rules[number])]
        others = tuple(own[candidates.index(other)] for other in routing.others)
        rule = (first.scorer, first.scorer_args, first.selector, first.selector_args)
        found.append(Routing(routing.name, *rule, others=others, router=routing.router))
    return found


def _chosen(final: Final, budget: int, curves: Curves, question: Question, folds: int) -> Final:
    """Return the choice with counts by question at one budget, if they are ahead of fixed ones out of fold."""
    fold = fold_of(torch.from_numpy(curves.images), folds).numpy()
    taken = np.full(len(fold), curves.budget)
    for number in np.unique(fold):
        here = fold == number
        if not here.all():
            taken[here] = curves.steps(curves.weights(~here, measured=True), here)
    samples = np.arange(len(fold))
    lead, error = paired(curves.divergence[:, curves.budget] - curves.divergence[samples, taken], curves.images)
    if not lead > LEVEL * error:
        return final
    rule = final.candidates[final.chosen[budget]]
    counting = Counting.of(rule, question, curves.weights(np.ones(len(fold), bool)))
    own = (values[samples, taken][:, None] for values in (curves.divergence, curves.agreed))
    chosen = [*final.chosen]
    chosen[budget] = len(final.candidates)
    return replace(
        final,
        candidates=[*final.candidates, counting],
        chosen=chosen,
        sums=with_candidate(final.sums, budget, Rows(curves.images, curves.questions, *own)),
        compared=[*final.compared, final.chosen[budget]],
    )
