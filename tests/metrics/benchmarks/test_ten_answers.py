"""Accuracy by ten answers is that of the authors' scripts: MMF's for TextVQA, the VizWiz API's for VizWiz."""

import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catp_lightning.metrics.benchmarks import TextVQAAccuracy, VizWizAccuracy
from catp_lightning.metrics.benchmarks.ten_answers import normalise_textvqa

MARKS = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = dict(zip(["none", "zero", "one", "two", "three"], "00123", strict=True))


def cleaned(text: str) -> str:
    """VQA's rule of marks, digits and articles on words that no contraction touches, mark by mark."""
    out = text.strip()
    for mark in MARKS:
        beside = f"{mark} " in text.strip() or f" {mark}" in text.strip()
        out = out.replace(mark, "" if beside or re.search(r"\d,\d", text) else " ")
    words = re.sub(r"\.(?!\d)", "", out).lower().split()
    return " ".join(NUMBERS.get(word, word) for word in words if word not in ("a", "an", "the"))


def as_mmf_reads(text: str) -> str:
    return cleaned(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").replace("\n", " "))


def leaving_each_out(prediction: str, answers: list[str]) -> float:
    """Mean over the ten people of min(1, answers of the other nine that are equal / 3)."""
    accuracies = []
    for person in range(10):
        others = answers[:person] + answers[person + 1 :]
        accuracies.append(min(1.0, sum(answer == prediction for answer in others) / 3))
    return sum(accuracies) / 10


TEXTS = ["2", "Two", "two dogs", "the 2 dogs.", "dog's", "dog 's", "1,000", "1000", "a/b", "a / b", "no?", "No"]
TEXTS += ["x?y", "x\ny"]


@settings(max_examples=60)
@given(st.sampled_from(TEXTS), st.lists(st.sampled_from(TEXTS), min_size=10, max_size=10))
def test_textvqa_normalises_both_sides(prediction: str, answers: list[str]) -> None:
    metric = TextVQAAccuracy()
    metric.update([prediction], [answers])
    expected = leaving_each_out(as_mmf_reads(prediction), [as_mmf_reads(answer) for answer in answers])
    assert metric.compute()["accuracy"].item() == pytest.approx(expected, abs=1e-6)


@settings(max_examples=60)
@given(st.sampled_from(TEXTS), st.lists(st.sampled_from([cleaned(text) for text in TEXTS]), min_size=10, max_size=10))
def test_vizwiz_normalises_the_prediction_alone(prediction: str, answers: list[str]) -> None:
    metric = VizWizAccuracy()
    metric.update([prediction], [answers])
    expected = leaving_each_out(cleaned(prediction), answers)
    assert metric.compute()["accuracy"].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("text", TEXTS)
def test_textvqa_texts_are_normalised_as_mmf_does(text: str) -> None:
    assert normalise_textvqa(text) == as_mmf_reads(text)


@pytest.mark.parametrize(
    ("metric", "prediction", "answers", "score"),
    [
        (TextVQAAccuracy, "Yes.", ["yes"] * 10, 1.0),  # normalised although all agree: VQAv2 gives 0
        (TextVQAAccuracy, "1,000", ["1000"] * 3 + ["x"] * 7, 0.9),
        (VizWizAccuracy, "Yes.", ["yes"] * 10, 1.0),
        (VizWizAccuracy, "yes", ["Yes"] * 10, 0.0),
    ],
)
def test_where_the_three_rules_differ(
    metric: Callable[[], TextVQAAccuracy], prediction: str, answers: list[str], score: float
) -> None:
    found = metric()
    found.update([prediction], [answers])
    assert found.compute()["accuracy"].item() == pytest.approx(score, abs=1e-6)
