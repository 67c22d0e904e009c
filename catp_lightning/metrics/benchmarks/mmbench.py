"""Accuracy on MMBench, plain and circular."""

from collections.abc import Sequence

from torch import Tensor

from catp_lightning.data.benchmarks.references import Rotation
from catp_lightning.metrics.benchmarks.question_rows import QuestionRows

_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def chosen_option(answer: str, options: Sequence[str]) -> str | None:
    """Return the letter of the option that an answer names, or None, by VLMEvalKit's rules without a language model.

    If exactly one of the options' letters is a word of the answer, it is that one; unless "A", which may be an article,
    is in an answer of more than three words. Else, if the text of exactly one option is in the answer, in any letter
    case, it is that one.

    >>> options = ["blue sky", "green grass"]
    >>> [chosen_option(answer, options) for answer in ("(B)", "Green grass.", "A or B", "It is a dog")]
    ['B', 'B', None, None]
    """
    words = answer.translate(_MARKS).split()
    letters = [chr(ord("A") + number) for number in range(len(options))]
    named = [letter for letter in letters if letter in words]
    if len(named) == 1 and not ("A" in words and len(words) > 3):
        return named[0]
    told = [letter for letter, option in zip(letters, options, strict=True) if option.lower() in answer.lower()]
    return told[0] if len(told) == 1 else None


class MMBenchAccuracy(QuestionRows):
    """Shares of questions that are answered right, in [0, 1], as VLMEvalKit computes them with exact matching.

    `accuracy` is over the questions with their options in the first order. `circular_accuracy`, which is there where
    the table has rotations, is over the questions too: one is right if it is in every order of its options. Questions
    of which not every order was answered are left out of it. An answer in which no option is found is wrong; the
    authors' server asks a language model about such answers.

    >>> metric = MMBenchAccuracy()
    >>> first, second = (Rotation(7 + k * 10**6, 7, 2, ("sky", "grass")[:: 1 - 2 * k], "AB"[k]) for k in range(2))
    >>> metric.update(["A", "A"], [first, second])
    >>> metric.compute()
    {'accuracy': tensor(1.), 'circular_accuracy': tensor(0.)}
    """

    def row(self, answer: str, of: Rotation) -> tuple[int, ...]:
        return of.question_id, of.group, of.rotations, int(chosen_option(answer, of.options) == of.answer)

    def compute(self) -> dict[str, Tensor]:
        """Return `accuracy` and, where there are rotations, `circular_accuracy`, each float32; NaN of no question."""
        found = self.found()
        first = [right for question_id, (group, _, right) in found.items() if question_id == group]
        by_group: dict[int, list[int]] = {}
        for group, _, right in found.values():
            by_group.setdefault(group, []).append(right)
        rotations = {group: count for group, count, _ in found.values()}
        whole = [all(rights) for group, rights in by_group.items() if len(rights) == rotations[group]]
        figures = {"accuracy": first}
        if max(rotations.values()) > 1:
            figures["circular_accuracy"] = [int(right) for right in whole]
        return {name: self.mean(values) for name, values in figures.items()}
