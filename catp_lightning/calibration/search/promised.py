"""Test of a promise on the checked answers, in each group of questions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from catp_lightning.calibration.asked import AskedImages
from catp_lightning.calibration.search.clusters import cluster_bound
from catp_lightning.calibration.search.promise import FixedSequence, Promise, upper_bound, walk
from catp_lightning.errors import PolicyError

SHOWN = 3
"""Number of groups that an error names at most."""


@dataclass(frozen=True)
class GroupResult:
    """What was counted and found of one group, at K budgets.

    Attributes:
        name: name of the group; "" if there are no groups.
        images: number of images with a question of the group.
        questions: number of questions of the group.
        most: largest number of questions of the group about one image of the whole split.
        disagreed: for each budget, the number of images, or of questions, that disagree, as the promise counts them.
        bounds: for each budget, the upper bound of the share that disagrees.
    """

    name: str
    images: int
    questions: int
    most: int
    disagreed: tuple[int, ...]
    bounds: tuple[float, ...]


@dataclass(frozen=True)
class PromisedGroups:
    """A promise, and the groups of questions in which it is tested; one group if the promise names no field.

    Attributes:
        promise: the promise.
        split: questions about all images of the split, of the learning part too.
        names: names of the groups, by checksum.
    """

    promise: Promise
    split: AskedImages
    names: Mapping[int, str]

    @cached_property
    def most(self) -> Mapping[int, int]:
        """Largest number of questions about one image of the split, by checksum of the group, sorted by its name."""
        keys = sorted(np.unique(self.split.groups).tolist(), key=lambda key: self.names.get(key, ""))
        return {key: int(self.split.questions[self.split.groups == key].max()) for key in keys}

    @property
    def each(self) -> Promise:
        """The promise with the confidence at which each group is tested."""
        return self.promise.of_each(len(self.most))

    def results(self, answers: AskedImages) -> list[GroupResult]:
        """Return what was found of each group, sorted by name, from the answers of the checking part."""
        return [self._result(key, answers.where(answers.groups == key)) for key in self.most]

    def walk(self, results: list[GroupResult]) -> FixedSequence:
        """Test the budgets, from the largest down: one holds if it does in every group."""
        disagreed = [sum(counts) for counts in zip(*(found.disagreed for found in results), strict=True)]
        return walk(self.promise, disagreed, [max(bounds) for bounds in zip(*(r.bounds for r in results), strict=True)])

    def refuse_too_few(self, checked: np.ndarray) -> None:
        """Raise PolicyError if some group could not keep the promise even if no answer of it changed.

        Args:
            checked: bool, True for the images in `split` that are of the checking part.
        """
        if self.promise.over == "images" and self.promise.group_by is None:
            self.promise.check_images(int(checked.sum()))
            return
        found = [(key, self.split.where(checked & (self.split.groups == key))) for key in self.most]
        small = [(key, some) for key, some in found if not self.promise.holds(self._without_disagreement(key, some))]
        if not small:
            return
        small.sort(key=lambda pair: len(pair[1].images))
        said = [self._too_few(key, len(some.images)) for key, some in small[:SHOWN]]
        more = f", and {len(small) - SHOWN} more groups are too small" if len(small) > SHOWN else ""
        groups = len(self.most)
        each = f", for which each of {groups} groups takes {self.each.confidence:.6g}" if groups > 1 else ""
        raise PolicyError(
            f"There are too few images to test a budget on, to promise a disagreement of at most "
            f"{self.promise.max_disagreement:g} {self._of()} with confidence {self.promise.confidence:g}{each}: "
            f"{'; '.join(said)}{more}. That is without any disagreement; each one seen takes more. Take more images"
            f"{', join small groups,' if self.promise.group_by else ','} raise max_disagreement, or lower confidence."
        )

    def _of(self) -> str:
        within = f" in each group of {self.promise.group_by!r:.100}" if self.promise.group_by else ""
        return f"over {self.promise.over}{within}"

    def _too_few(self, key: int, images: int) -> str:
        mean = float(self.split.questions[self.split.groups == key].mean())
        within = f"group {self.names.get(key, '')!r:.100} has" if self.promise.group_by else "there are"
        if self.promise.over == "images" or self.most[key] == 1:
            return f"{within} {images} and takes at least {self.each.images_needed}"
        halved = Promise(self.each.max_disagreement, (1 + self.each.confidence) / 2)
        needed = math.ceil(halved.images_needed * self.most[key] / mean)
        return (
            f"{within} {images} and takes about {needed}, as up to {self.most[key]} questions, on average {mean:.2f}, "
            "are asked about one image"
        )

    def _without_disagreement(self, key: int, some: AskedImages) -> float:
        none = np.zeros((len(some.images), 1), dtype=np.int64)
        asked = AskedImages(some.images, some.groups, some.questions, none, none, some.place)
        return self._result(key, asked).bounds[0]

    def _result(self, key: int, asked: AskedImages) -> GroupResult:
        images, confidence, most = len(asked.images), self.each.confidence, self.most[key]
        if self.promise.over == "images":
            counts = asked.drawn.sum(0).tolist()
            bounds = [upper_bound(count, images, confidence) if images else 1.0 for count in counts]
        else:
            counts = asked.disagreed.sum(0).tolist()
            bounds = [
                cluster_bound(asked.questions, asked.disagreed[:, k], asked.drawn[:, k], asked.place, most, confidence)
                for k in range(len(counts))
            ]
        questions = int(asked.questions.sum())
        return GroupResult(self.names.get(key, ""), images, questions, most, tuple(counts), tuple(bounds))
