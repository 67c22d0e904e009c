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


class Rotation(NamedTuple):
    """A question of MMBench, with its options in one of their orders.

    Attributes:
        question_id: the question's own id.
        group: id of the question whose options are rotated; in their first order, the same as `question_id`.
        rotations: number of questions of the group.
        options: texts of the options, the first of which is A.
        answer: letter of the right one.
    """

    question_id: int
    group: int
    rotations: int
    options: tuple[str, ...]
    answer: str


class Judgement(NamedTuple):
    """One of the two questions about an image of MME.

    Attributes:
        question_id: the question's number.
        image: number of the image.
        subtask: a name in `mme.SUBTASKS`.
        answer: "yes" or "no".
    """

    question_id: int
    image: int
    subtask: str
    answer: str


class Box(NamedTuple):
    """A box in an image, in pixels.

    Attributes:
        left: pixels from the left of the image to the box's left.
        top: from the top to the box's top.
        right: from the left to the box's right.
        bottom: from the top to the box's bottom.
        x_unit: pixels that a unit across is in the model's answers.
        y_unit: pixels that a unit down is in the model's answers.
    """

    left: float
    top: float
    right: float
    bottom: float
    x_unit: float
    y_unit: float


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


class GroupedChoice(NamedTuple):
    """A question with options, of a group whose accuracy is told by itself.

    Attributes:
        group: a task of MVBench, or a duration of Video-MME.
        answer: letter of the right option.
    """

    group: str
    answer: str
