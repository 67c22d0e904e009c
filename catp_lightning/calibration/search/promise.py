"""Find the smallest budget that keeps a promised rate of disagreement with the unpruned model, by an exact test.

Budgets are tested from the largest down, each on the same images, and testing stops at the first that fails. To choose
a budget that disagrees too often, testing must pass the first such budget on its way, which happens with probability
1 - confidence at most. So no correction for multiple tests is needed, however the answers at different budgets are
correlated (fixed-sequence testing). This requires budgets, an order and policies that were fixed without these images,
and images that are independent draws from what the model will see.

What is counted is images, with one question of each (`Promise.over` "images"), or questions (`clusters.py`). With
groups of questions each group has a test of its own at every budget, and a budget holds if all do. Each has the share
1 / groups of the risk, so that the bounds of all groups at a budget hold together.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

from scipy.stats import beta

from catp_lightning.errors import PolicyError
from catp_lightning.methods.budget import keep_count
from catp_lightning.policy import check_keep

# Two steps per halving; each is a whole number of tokens at 32, 64 and 576 tokens. A finer grid would save little (the
# budget above the first failure keeps at most 1.5 times as many tokens), and each step is one more that can fail by
# chance.
GRID = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 3 / 32, 1 / 16)
"""Budgets tested by default: shares of an image's visual tokens, largest first."""

Over = Literal["images", "questions"]

# A bound that equals the promise in exact arithmetic (1 - 0.94 ** 2 = 0.1164) may come out a unit in the last place
# above it. This slack costs an equally small amount of confidence.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Promise:
    """Upper limit on the share of new images or questions whose answer differs from the unpruned model's.

    Attributes:
        max_disagreement: largest share that may disagree, in (0, 1).
        confidence: lower limit on the probability that the promise is kept, over draws of the test images, in (0, 1).
        over: what the share is of. "images": new images, each with one question drawn at random among those asked about
            it. "questions": all questions about new images, so that an image counts as often as it is asked about.
        group_by: name of the batch's field that divides questions into groups, in each of which the promise is to be
            kept; None: there are no groups.

    Raises:
        PolicyError: a value is not a number strictly between 0 and 1, or not one of those named.

    Example:
        >>> promise = Promise(max_disagreement=0.02, confidence=0.95)
        >>> promise.images_needed, promise.images_for(1), promise.images_for(2)
        (149, 236, 313)
    """

    max_disagreement: float
    confidence: float = 0.95
    over: Over = "images"
    group_by: str | None = None

    def __post_init__(self) -> None:
        if self.over not in get_args(Over):
            raise PolicyError(f"over is {self.over!r:.200}; a promise is over 'images' or over 'questions'.")
        if self.group_by is not None and (not isinstance(self.group_by, str) or not self.group_by):
            raise PolicyError(f"group_by is {self.group_by!r:.200}; it is the name of a field of the batches.")
        for name, value in (("max_disagreement", self.max_disagreement), ("confidence", self.confidence)):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0 < value < 1):
                hint = f" For {value:g} percent write {value / 100:g}." if number and 1 < value < 100 else ""
                raise PolicyError(f"{name} is {value!r}; it is a number between 0 and 1, neither included.{hint}")

    @classmethod
    def asked(
        cls, max_disagreement: float | None, confidence: float, over: Over, group_by: str | None
    ) -> "Promise | None":
        """Return the promise that is asked for; None if `max_disagreement` is None.

        Raises:
            PolicyError: a value is not allowed, or says how to test a promise where none is asked for.
        """
        if max_disagreement is not None:
            return cls(max_disagreement, confidence, over, group_by)
        if over != "images" or group_by is not None:
            raise PolicyError(
                f"over is {over!r:.200} and group_by {group_by!r:.200}: they say what a promise is of, and none is "
                "asked for. Give max_disagreement, or leave them out."
            )
        return None

    def of_each(self, groups: int) -> "Promise":
        """Return the promise that each of several groups is tested on, so that their bounds hold together.

        >>> round(Promise(0.02, 0.95).of_each(5).confidence, 6)
        0.99
        """
        return self if groups <= 1 else replace(self, confidence=1 - (1 - self.confidence) / groups)

    @property
    def images_needed(self) -> int:
        """Minimum number of test images, none of which may disagree.

        It is ln(1 - confidence) / ln(1 - max_disagreement), rounded up.
        """
        return self.images_for(0)

    def images_for(self, disagreed: int) -> int:
        """Return the smallest number of images on which a budget still passes when `disagreed` of them disagree."""
        short, enough = disagreed, disagreed + 1  # when all disagree, nothing can be promised
        while not self._passes(disagreed, enough):
            short, enough = enough, 2 * enough
        while enough - short > 1:
            middle = (short + enough) // 2
            short, enough = (short, middle) if self._passes(disagreed, middle) else (middle, enough)
        return enough

    def check_images(self, images: int) -> None:
        """Raise PolicyError, with the numbers needed, if `images` are too few to pass even without disagreement."""
        if images < 1 or not self._passes(0, images):
            raise PolicyError(
                f"There are {images} images to test a budget on, too few to promise a disagreement of at most "
                f"{self.max_disagreement:g} with confidence {self.confidence:g}: it takes at least "
                f"{self.images_needed}, and more for each disagreement seen: {self.images_for(1)} for one, "
                f"{self.images_for(2)} for two. Take more images, raise max_disagreement, or lower confidence."
            )

    def holds(self, bound: float) -> bool:
        """Return True if an upper bound of the disagreement is within the promise."""
        return bound <= self.max_disagreement * (1 + _ROUNDING)

    def _passes(self, disagreed: int, images: int) -> bool:
        return self.holds(upper_bound(disagreed, images, self.confidence))


@dataclass(frozen=True)
class TestedBudget:
    """Test result of one budget.

    Attributes:
        disagreed: number of images, or questions, whose answer differs from the unpruned model's; of all groups
            together.
        bound: upper bound of the share that disagrees, for this budget considered alone; the largest of all groups.
        tested: True if testing came this far; budgets after the first failure are reported, not tested.
        holds: True if the budget was tested and its bound is within the promise.
    """

    disagreed: int
    bound: float
    tested: bool
    holds: bool


@dataclass(frozen=True)
class FixedSequence:
    """Test results of all budgets, from the largest down, and the budget that was chosen.

    Attributes:
        steps: one result for each budget, in the order given.
        chosen: index of the last budget that holds; None: not even the first, so only keep=1.0 keeps the promise.
    """

    steps: tuple[TestedBudget, ...]
    chosen: int | None


def fixed_sequence_test(promise: Promise, disagreed: Sequence[int], images: int) -> FixedSequence:
    """Test budgets in a fixed order and stop at the first that fails.

    Args:
        promise: promise that each budget is tested against.
        disagreed: for each budget, largest first, number of the `images` that disagree with the unpruned model. Budgets
            and their policies were fixed before anyone saw these images.
        images: number of test images, the same for every budget.

    Raises:
        PolicyError: there are fewer images than the promise needs.
        ValueError: a count is not in 0 .. images.

    Example:
        >>> result = fixed_sequence_test(Promise(0.02), [0, 1, 4, 1], images=300)
        >>> result.chosen, [step.tested for step in result.steps], [step.holds for step in result.steps]
        (1, [True, True, True, False], [True, True, False, False])
    """
    promise.check_images(images)
    counts = [operator.index(count) for count in disagreed]
    return walk(promise, counts, [upper_bound(count, images, promise.confidence) for count in counts])


def walk(promise: Promise, disagreed: Sequence[int], bounds: Sequence[float]) -> FixedSequence:
    """Walk down the budgets as long as their upper bounds are within the promise.

    Args:
        promise: promise that each budget is tested against.
        disagreed: for each budget, largest first, what `TestedBudget` counts.
        bounds: for each budget, the upper bound of the share that disagrees.
    """
    steps: list[TestedBudget] = []
    tested = True
    for count, bound in zip(disagreed, bounds, strict=True):
        holds = tested and promise.holds(bound)
        steps.append(TestedBudget(count, bound, tested, holds))
        tested = holds
    passed = sum(step.holds for step in steps)
    return FixedSequence(tuple(steps), passed - 1 if passed else None)


@lru_cache(maxsize=4096)  # the inverse of the beta distribution takes longer than a small test does
def upper_bound(disagreed: int, images: int, confidence: float) -> float:
    """Return the exact (Clopper-Pearson) one-sided upper bound of the share of images that disagrees.

    It is the largest share at which `disagreed` of `images` or fewer disagree with probability 1 - confidence; 1.0 if
    all disagree.

    Raises:
        ValueError: not 0 <= disagreed <= images, or there are no images.

    >>> round(upper_bound(0, 149, 0.95), 5), round(upper_bound(3, 300, 0.95), 5), upper_bound(5, 5, 0.95)
    (0.0199, 0.02564, 1.0)
    """
    if not 0 <= disagreed <= images or images == 0:
        raise ValueError(f"{disagreed} of {images} images disagree; the count is between 0 and images, at least 1.")
    return 1.0 if disagreed == images else float(beta.ppf(confidence, disagreed + 1, images - disagreed))


def descending(budgets: Iterable[int | float], tokens: int) -> list[int | float]:
    """Sort budgets by the number of `tokens` they keep, most first; of budgets that keep equally many, keep the first.

    A second budget of the same size would test the same promise twice.

    Raises:
        PolicyError: a budget is neither a share in (0, 1] nor a number of tokens from 1.

    >>> descending([0.125, 16, 0.5, 0.25], tokens=32)
    [16, 0.25, 0.125]
    """
    by_size: dict[int, int | float] = {}
    for budget in budgets:
        check_keep(budget)
        by_size.setdefault(keep_count(budget, tokens), budget)
    return [by_size[size] for size in sorted(by_size, reverse=True)]
