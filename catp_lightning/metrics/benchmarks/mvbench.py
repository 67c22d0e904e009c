"""Accuracy on MVBench."""

from typing import ClassVar

from catp_lightning.data.benchmarks.mvbench import TASKS
from catp_lightning.metrics.benchmarks.grouped_choices import GroupedChoices


def names_option(answer: str, letter: str) -> bool:
    """Return True if an answer names an option, as `check_ans` of MVBench's authors reads it.

    They have the model continue "Best option:(" and put the bracket before its first line. The first word of that, in
    lower case, is the option "(a)" or has it in it; or is a part of it, periods left out. An answer of which nothing
    but the bracket is left is wrong; the authors' comparison, to which "(" is a part of "(a)", holds it for right.

    >>> [names_option(answer, "B") for answer in ("B) sky", "(B)", "b.", "A", "The sky", "")]
    [True, True, True, False, False, False]
    """
    word = ("(" + answer.strip().split("\n")[0]).lower().split(" ")[0]
    bare, option = word.replace(".", ""), f"({letter.lower()})"
    return bare != "(" and (bare in option or option in word)


class MVBenchAccuracy(GroupedChoices):
    """Shares of questions whose answer names the right option (`names_option`): of each task, and of all questions.

    `accuracy` over all questions is the mean of the 20 tasks, as each has 200.

    >>> from catp_lightning.data.benchmarks.references import GroupedChoice
    >>> accuracy = MVBenchAccuracy()
    >>> accuracy.update(["B) sky", "A"], [GroupedChoice("moving_count", "B"), GroupedChoice("action_count", "B")])
    >>> accuracy.compute()
    {'action_count_accuracy': tensor(0.), 'moving_count_accuracy': tensor(1.), 'accuracy': tensor(0.5000)}
    """

    groups: ClassVar[tuple[str, ...]] = TASKS

    def judge(self, prediction: str, answer: str) -> bool:
        return names_option(prediction, answer)
