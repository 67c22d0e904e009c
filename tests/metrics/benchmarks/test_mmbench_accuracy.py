"""Options are found by VLMEvalKit's rules, and a question is right if it is in every order of its options."""

from itertools import product

import pytest

from catp_lightning.data.benchmarks.references import Rotation
from catp_lightning.metrics.benchmarks import MMBenchAccuracy
from catp_lightning.metrics.benchmarks.mmbench import chosen_option

OPTIONS = ["a red bus", "a blue bus", "the sky"]


def as_the_kit_infers(answer: str, options: list[str]) -> str | None:
    """can_infer: letters as words, else option texts."""
    text = answer
    for mark in ".()[],:;!*#{}":
        text = text.replace(mark, " ")
    words = [word.strip() for word in text.split()]
    letters = "ABCDEFGH"[: len(options)]
    if sum(letter in words for letter in letters) == 1:
        for letter in letters:
            if "A" in words and len(words) > 3:
                break
            if letter in words:
                return letter
    held = [letter for letter, option in zip(letters, options, strict=True) if option.lower() in answer.lower()]
    return held[0] if len(held) == 1 else None


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(B) a blue bus", "B"),
        ("The answer is **C**.", "C"),
        ("A", "A"),
        ("A. yes", "A"),
        ("A dog is here", None),  # an article
        ("A dog in the sky", "C"),  # an article, and the text of an option
        ("A or B", None),
        ("b", None),
        ("D", None),
        ("A Red Bus!", "A"),
        ("a red bus or a blue bus", None),
        ("bus", None),
        ("", None),
    ],
)
def test_options_are_found_in_answers(answer: str, letter: str | None) -> None:
    assert chosen_option(answer, OPTIONS) == letter == as_the_kit_infers(answer, OPTIONS)


def rotations(group: int, count: int) -> list[Rotation]:
    """A question whose right option is the first; each order puts the first option last."""
    options = [f"option {number}" for number in range(count)]
    turned = [options[turn:] + options[:turn] for turn in range(count)]
    return [
        Rotation(group + turn * 10**6, group, count, tuple(order), "ABCD"[order.index("option 0")])
        for turn, order in enumerate(turned)
    ]


def test_plain_accuracy_is_over_first_orders_and_circular_accuracy_over_questions() -> None:
    metric, plain, circular = MMBenchAccuracy(), [], []
    for group, rights in enumerate(product([True, False], repeat=3)):
        answers = [of.answer if right else "Z" for of, right in zip(rotations(group, 3), rights, strict=True)]
        metric.update(answers, rotations(group, 3))
        plain.append(rights[0])
        circular.append(all(rights))
    found = metric.compute()
    assert found["accuracy"].item() == sum(plain) / 8 == 0.5
    assert found["circular_accuracy"].item() == sum(circular) / 8 == 1 / 8


def test_questions_that_are_not_whole_leave_the_circular_accuracy_alone() -> None:
    metric = MMBenchAccuracy()
    whole, cut = rotations(1, 2), rotations(2, 4)[:3]
    metric.update([of.answer for of in whole], whole)
    metric.update(["Z"] * 3, cut)
    assert {name: value.item() for name, value in metric.compute().items()} == {
        "accuracy": 0.5,
        "circular_accuracy": 1.0,
    }


def test_a_table_without_rotations_has_no_circular_accuracy() -> None:
    metric = MMBenchAccuracy()
    metric.update(["A", "B"], [rotations(1, 2)[0]._replace(rotations=1), rotations(2, 2)[0]._replace(rotations=1)])
    assert {name: value.item() for name, value in metric.compute().items()} == {"accuracy": 0.5}


def test_a_question_that_two_processes_were_given_counts_once() -> None:
    first, second = MMBenchAccuracy(), MMBenchAccuracy()
    first.update(["A"], rotations(1, 2)[:1])
    second.update(["A", "Z"], [rotations(1, 2)[0], rotations(2, 2)[0]])
    first.merge_state(second)
    assert first.compute()["accuracy"].item() == 0.5
