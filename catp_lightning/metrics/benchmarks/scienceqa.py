"""Accuracy on ScienceQA."""

import re

from catp_lightning.data.benchmarks.references import Choice
from catp_lightning.metrics.benchmarks.mean_score import MeanScore

_SAID = re.compile(r"The answer is ([A-E])")


def chosen_letter(answer: str) -> str | None:
    """Return the letter of the option that an answer names, or None, as LLaVA's `eval_science_qa.py` reads it.

    An answer is a letter from A to E alone, or begins with the letter, a period and a space (or a line break), or has
    "The answer is" before the letter.

    >>> [chosen_letter(answer) for answer in ("B", "B. sky", "The answer is C.", "B.", "sky")]
    ['B', 'B', 'C', None, None]
    """
    text = answer.replace("\n", ". ")
    if text.strip() in tuple("ABCDE"):
        return text.strip()
    if text[:1] in tuple("ABCDE") and text[1:3] == ". ":
        return text[0]
    said = re.search(r"The answer is ([A-E])\.", text) or _SAID.search(text)
    return said[1] if said else None


class ScienceQAAccuracy(MeanScore):
    """Share of questions whose answer names the right option (`chosen_letter`), in [0, 1].

    An answer that names none, or a letter beyond the question's options, is wrong.

    >>> accuracy = ScienceQAAccuracy()
    >>> accuracy.update(["B", "grass"], [Choice(("sky", "grass"), "B")] * 2)
    >>> accuracy.compute()
    {'accuracy': tensor(0.5000)}
    """

    def points(self, prediction: str, reference: Choice) -> int:
        """Return 1 if a prediction names the right option, else 0."""
        return int(chosen_letter(prediction) == reference.answer)
