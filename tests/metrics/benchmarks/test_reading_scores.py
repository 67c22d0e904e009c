"""ANLS and OCRBench's score are those of the authors' scripts."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catp_lightning.data.benchmarks.ocrbench import KINDS
from catp_lightning.data.benchmarks.references import Reading
from catp_lightning.metrics.benchmarks import ANLS, OCRBenchScore
from catp_lightning.metrics.benchmarks.docvqa import anls, edit_distance

texts = st.text(st.sampled_from("abAB 1"), max_size=7)


@cache
def distance(one: str, other: str) -> int:
    """Levenshtein's recursion, by the last characters."""
    if not one or not other:
        return len(one) + len(other)
    replaced = distance(one[:-1], other[:-1]) + (one[-1] != other[-1])
    return min(replaced, distance(one[:-1], other) + 1, distance(one, other[:-1]) + 1)


def of_the_competition(prediction: str, answers: list[str]) -> float:
    """Least distance over the length of the longer text, as written; what is then below a half is nothing."""
    values = []
    for answer in answers:
        one, other = (" ".join(text.strip().lower().split()) for text in (answer, prediction))
        longer = max(len(answer), len(prediction))
        values.append(distance(one, other) / longer if longer else 0.0)
    found = 1 - min(values)
    return 0.0 if found < 0.5 else found


@settings(max_examples=80)
@given(texts, texts)
def test_edit_distances_are_those_of_the_recursion(one: str, other: str) -> None:
    assert edit_distance(one, other) == distance(one, other) == edit_distance(other, one)


@settings(max_examples=80)
@given(texts, st.lists(texts, min_size=1, max_size=3))
def test_anls_is_that_of_the_competition(prediction: str, answers: list[str]) -> None:
    assert anls(prediction, answers) == pytest.approx(of_the_competition(prediction, answers), abs=1e-12)


def test_anls_is_cut_at_a_half_and_averaged() -> None:
    pairs = [("ab", ["abcd"]), ("a", ["abc"]), ("  A  B ", ["a b"]), ("", [""]), ("1/8/93", ["1/8/98", "x"])]
    assert [anls(*pair) for pair in pairs] == pytest.approx([0.5, 0.0, 1.0, 1.0, 5 / 6])
    metric = ANLS()
    for prediction, answers in pairs:
        metric.update([prediction], [answers])
    assert metric.compute()["anls"].item() == pytest.approx(sum(of_the_competition(*pair) for pair in pairs) / 5)


ROWS = [
    ("The sign says STOP", Reading("Regular Text Recognition", ("stop",), False), True),
    ("ST OP", Reading("Irregular Text Recognition", ("stop",), False), False),
    ("air\nfrance", Reading("Scene Text-centric VQA", ("Airfrance", "Air france "), False), True),
    ("", Reading("Scene Text-centric VQA", ("x",), False), False),
    ("Total: 7.50", Reading("Key Information Extraction", ("7.50",), False), True),
    ("x_1=\\frac{2}{3}", Reading("Handwritten Mathematical Expression Recognition", ("x _ 1 = ",), True), True),
    ("X_1=0", Reading("Handwritten Mathematical Expression Recognition", ("x _ 1 = 0\n",), True), False),
    ("y", Reading("Handwritten Mathematical Expression Recognition", ("x", "y\n"), True), True),
    ("1/8/93", Reading("Doc-oriented VQA", ("1/8/93",), False), True),
]


def as_the_script_counts(prediction: str, reference: Reading) -> bool:
    found = False
    for answer in reference.answers:
        if reference.formula:
            wanted, given_ = ("".join(text.strip().replace("\n", " ").split(" ")) for text in (answer, prediction))
        else:
            wanted, given_ = (text.lower().strip().replace("\n", " ") for text in (answer, prediction))
        found = found or wanted in given_
    return found


def test_ocrbench_counts_answers_that_hold_a_right_text() -> None:
    assert [as_the_script_counts(answer, reference) for answer, reference, _ in ROWS] == [right for *_, right in ROWS]
    metric = OCRBenchScore()
    for answer, reference, _ in ROWS:
        metric.update([answer], [reference])
    parts = ("text_recognition", "scene_text_vqa", "document_vqa", "key_information", "formulas")
    by_hand = {part: sum(right for _, reference, right in ROWS if KINDS[reference.kind] == part) for part in parts}
    expected = {"score": 6, "accuracy": 6 / 9, **by_hand}
    assert sum(by_hand.values()) == 6 and by_hand["formulas"] == 2
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(expected)
