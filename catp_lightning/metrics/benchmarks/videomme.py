"""Accuracy on Video-MME."""

import re
from typing import ClassVar

from torch import Tensor

from catp_lightning.data.benchmarks.videomme import DURATIONS
from catp_lightning.metrics.benchmarks.grouped_choices import GroupedChoices

_BEFORE = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",  # joined in the authors' file, where commas are missing
    "Best answer:Best option:",
)


def first_letter(answer: str) -> str | None:
    """Return the option that an answer names, or None, as Video-MME's `eval_your_results.py` reads it.

    It is the first of the letters A, B, C and D anywhere in the answer, after phrases such as "The best answer is" were
    taken out.

    >>> [first_letter(answer) for answer in ("B", "The best answer is C.", "(D) sky", "a dog", "Best answer: A")]
    ['B', 'C', 'D', None, 'B']
    """
    for phrase in _BEFORE:
        answer = answer.replace(phrase, "")
    found = re.search("[ABCD]", answer)
    return found[0] if found else None


class VideoMMEAccuracy(GroupedChoices):
    """Shares of answers that name the right option (`first_letter`): of short, medium and long videos, and of all.

    As in the authors' script, answers that name no option are left out. `answered` is the share of questions whose
    answer names one.

    >>> from catp_lightning.data.benchmarks.references import GroupedChoice
    >>> accuracy = VideoMMEAccuracy()
    >>> accuracy.update(["B", "A", "no idea"], [GroupedChoice("short", "B")] * 2 + [GroupedChoice("long", "B")])
    >>> accuracy.compute()
    {'short_accuracy': tensor(0.5000), 'long_accuracy': tensor(nan), 'accuracy': tensor(0.5000),
     'answered': tensor(0.6667)}
    """

    groups: ClassVar[tuple[str, ...]] = DURATIONS

    def judge(self, prediction: str, answer: str) -> bool | None:
        letter = first_letter(prediction)
        return None if letter is None else letter == answer

    def compute(self) -> dict[str, Tensor]:
        return {**super().compute(), "answered": self.answered.sum().float() / self.asked.sum().float()}
