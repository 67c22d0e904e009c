"""What answers are compared with, where that is more than a text or several: plain values, as batches hold them."""

from typing import NamedTuple


class Choice(NamedTuple):
    """A question with options, of which one is right.

    Attributes:
        options: texts of the options, the first of which is A.
        answer: letter of the right one.
    """

    options: tuple[str, ...]
    answer: str


class Reading(NamedTuple):
    """Text that is to be read, in OCRBench.

    Attributes:
        kind: what is asked, a key of `ocrbench.KINDS`.
        answers: texts of which one has to be in the answer.
        formula: True if spaces and letter case are those of a formula: the former do not count, the latter does.
    """

    kind: str
    answers: tuple[str, ...]
    formula: bool
