"""An answer's option is read as LLaVA's evaluation of ScienceQA reads it."""

import pytest

from catp_lightning.data.benchmarks.references import Choice
from catp_lightning.metrics.benchmarks import ScienceQAAccuracy

CASES = {
    "B": "B",
    " B ": "B",
    "B. grass": "B",
    "B\ngrass": "B",
    "B\n": "B",
    "B.": None,
    "b": None,
    "F": None,
    "F. x": None,
    "BC": None,
    "(B)": None,
    "": None,
    "The answer is B.": "B",
    "The answer is B": "B",
    "So: The answer is Because of it": "B",
    "The answer is A or so. The answer is C.": "C",  # with a period goes before without
    "the answer is B.": None,
    "A. no. The answer is B.": "A",
}


def as_llava_reads(text: str) -> str:
    """The rules in their order, with no regular expression."""
    text = text.replace("\n", ". ")
    if text.strip() in ["A", "B", "C", "D", "E"]:
        return text.strip()
    if len(text) >= 3 and text[0] in "ABCDE" and text[1:3] == ". ":
        return text[0]
    start = "The answer is "
    places = [place for place in range(len(text)) if text.startswith(start, place)]
    letters = [text[place + len(start) :][:2] for place in places]
    for letter in [two for two in letters if two[1:] == "."] + letters:
        if letter[:1] and letter[0] in "ABCDE":
            return letter[0]
    return "FAILED"


@pytest.mark.parametrize("text", CASES)
def test_the_right_option_counts_if_it_is_named(text: str) -> None:
    assert as_llava_reads(text) == (CASES[text] or "FAILED")
    metric = ScienceQAAccuracy()
    for letter in "ABC":
        metric.update([text], [Choice(("one", "two", "three"), letter)])
    named = as_llava_reads(text)
    assert metric.compute()["accuracy"].item() == pytest.approx((named in ("A", "B", "C")) / 3)
