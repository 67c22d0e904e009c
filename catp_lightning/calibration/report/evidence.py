"""Evidence of a calibration, as a policy's JSON holds it: the type of each entry, and functions that read them."""

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict, cast

from catp_lightning.calibration.fit.fitting import FitEvidence
from catp_lightning.calibration.fit.texts import QuestionComponent
from catp_lightning.policy import PruningPolicy


class Figures(TypedDict):
    """Figures of one candidate at one budget, on `samples` samples.

    `divergence` is the mean over samples of KL(unpruned || pruned) in nats, with its standard error; `agreement` is the
    share of answers that are the unpruned model's, with Wilson's 95% interval.
    """

    samples: int
    divergence: float
    divergence_error: float
    agreement: float
    interval: Sequence[float]


class CandidateRow(TypedDict):
    """One candidate: its figures over the rounds, and on the checking part; None: it was eliminated before.

    `inside` is there, and True, if tokens leave at one layer inside the decoder and nowhere else.

    If calibration perturbed, the rounds' divergence is a mean over images as they are and perturbed.
    """

    name: str
    control: bool
    choose: Figures
    check: Figures | None
    inside: NotRequired[bool]


class BestControl(TypedDict):
    """The control that agreed most on the checking part, and the lead of the choice over it, paired by question."""

    name: str
    agreement: float
    difference: float
    interval: Sequence[float]
    verdict: str


class RetentionPoint(TypedDict):
    """A point of the retention curve: agreement of a budget's choice on samples it was not chosen on.

    `keep` is the budget, a price where budgets are prices. `tokens` is the number of an image's visual tokens that stay
    to the end. `prices` has what the choice costs, a share of what the unpruned model pays in each unit that is known.
    """

    keep: int | float
    tokens: int
    chosen: str
    control: bool
    agreement: float
    interval: Sequence[float]
    best_control: BestControl | None
    prices: NotRequired[Mapping[str, float]]


class GroupStep(TypedDict):
    """The test of one group of questions at one budget: what disagreed, and the upper bound of the share that does."""

    name: str
    disagreed: int
    bound: float


class PromiseStep(TypedDict):
    """The test of one budget, as in `TestedBudget`; with groups the test of each."""

    keep: int | float
    disagreed: int
    bound: float
    tested: bool
    holds: bool
    groups: NotRequired[Sequence[GroupStep]]


class PromisedGroup(TypedDict):
    """A group of questions that a promise was tested on.

    `images` is the number of images with such a question, `questions` the number of these questions, `most_questions`
    the largest number about one image of the whole split.
    """

    name: str
    images: int
    questions: int
    most_questions: int


class PromiseEvidence(TypedDict):
    """A promise, the number of images it was tested on, and the test of each budget, from the largest down.

    `unit` is what budgets are paid in, where they are prices.
    Without `over` the promise is over images: one question of each was tested. `questions` and `most_questions` are as
    in `PromisedGroup`, for all groups together. With groups, `group_by` is the batch's field that names them and
    `group_confidence` the confidence of the test of each.
    """

    max_disagreement: float
    confidence: float
    images: int
    steps: Sequence[PromiseStep]
    unit: NotRequired[str]
    over: NotRequired[str]
    questions: NotRequired[int]
    most_questions: NotRequired[int]
    group_by: NotRequired[str]
    group_confidence: NotRequired[float]
    groups: NotRequired[Sequence[PromisedGroup]]


class Evidence(TypedDict):
    """Evidence of a policy; statistics have an entry of their own each, by name.

    `samples` counts samples by part of the split, `tokens` is the mean number of visual tokens of an image, `images`
    are encoded hashes, `fitted` has an entry for each scorer whose heads were fitted, the list "slots", and, as
    `NetworkEvidence`, "learned". `components` says what the components of questions mean, in the order of their
    variance; it is there if methods read them. `perturbed` has, by perturbation and candidate, figures on the checking
    part's samples with perturbed images; it is there if calibration perturbed. `prices` are those of the policy, as in
    its point of `retention`; it is there if budgets are prices.
    """

    chosen: str
    control: bool
    samples: Mapping[str, int]
    tokens: float
    images: str
    retention: Sequence[RetentionPoint]
    fitted: Mapping[str, Any]
    components: NotRequired[Sequence[QuestionComponent]]
    promise: NotRequired[PromiseEvidence]
    candidates: Sequence[CandidateRow]
    perturbed: NotRequired[Mapping[str, Mapping[str, Figures]]]
    prices: NotRequired[Mapping[str, float]]


def evidence_of(policy: PruningPolicy) -> Evidence:
    """Return the evidence of a calibrated policy."""
    return cast(Evidence, policy.evidence)


def amount(policy: PruningPolicy) -> int | float:
    """Return the number in a policy's budget: the price it was chosen for, or `keep` if budgets are tokens."""
    return policy.keep if policy.budget is None else next(iter(policy.budget.values()))


def unit(policy: PruningPolicy) -> str:
    """Return what a policy's budget is paid in, "keep" for tokens."""
    return "keep" if policy.budget is None else next(iter(policy.budget))


def budget_name(policy: PruningPolicy) -> str:
    """Return a policy's budget in words: "keep 0.5" or "prefill_flops 0.25"."""
    return f"{unit(policy)} {amount(policy)}"


def visual_tokens(policy: PruningPolicy) -> int:
    """Return the number of visual tokens of an image, the rounded mean where images differ."""
    return round(evidence_of(policy)["tokens"])


def fits(policy: PruningPolicy) -> dict[str, FitEvidence]:
    """Return what the probes found for each scorer whose heads were fitted, by name."""
    return {name: found for name, found in evidence_of(policy)["fitted"].items() if name not in ("slots", "learned")}


def checked(policy: PruningPolicy, name: str) -> tuple[float, ...]:
    """Return (agreement, low, high) of a candidate on the checking part; empty if it was eliminated before."""
    for row in evidence_of(policy)["candidates"]:
        if row["name"] == name and row["check"]:
            return row["check"]["agreement"], *row["check"]["interval"]
    return ()
