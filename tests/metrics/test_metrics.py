"""VQA accuracy, agreement, tokens kept and their intervals, by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import Metric

from catp_lightning.metrics import Agreement, TokensKept, VQAAccuracy, normalise_answer, vqa_score, wilson_interval


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes.", "yes"),
        ("  The   RED\tbus ", "red bus"),
        ("none", "0"),
        ("Ten", "10"),
        ("eleven", "eleven"),
        ("a an the", ""),
        ("1,000", "1000"),
        ("100,978 m/s", "100978 ms"),  # a comma between digits removes every mark without a space
        ("m/s", "m s"),
        ("left,right", "left right"),
        ("left, right", "left right"),
        ("well-known -", "wellknown"),  # a mark that stands beside a space anywhere is removed everywhere
        ("a/;b c", "b c"),  # "a" is an article once the marks are spaces
        ("x/; y", "x y"),  # the slash is judged before the semicolon beside it goes
        ("x /;y", "x y"),
        ("2.5", "2.5"),
        ("5.", "5"),
        ("U.S.", "us"),
        (".5", ".5"),
        ("2:50", "2:50"),
        ("girl's", "girl's"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # two apostrophes missing: not in the official list
        ("couldn'tve", "couldn't've"),
        ("twas", "'twas"),
    ],
)
def test_answers_are_normalised_by_the_official_rule(answer, expected):
    assert normalise_answer(answer) == expected


@settings(max_examples=40)
@given(st.lists(st.sampled_from(["2", "two", "2 dogs", "dog", "the dog."]), min_size=10, max_size=10))
def test_score_is_the_mean_over_leaving_each_person_out(answers):
    prediction = "Two"
    alike = len(set(answers)) == 1  # then nothing is normalised, and "Two" is none of the answers
    equal = [not alike and answer in ("2", "two") for answer in answers]
    by_hand = sum(min(1, (sum(equal) - equal[person]) / 3) for person in range(10)) / 10
    assert vqa_score(prediction, answers) / 30 == pytest.approx(by_hand, abs=1e-12)


def test_unanimous_answers_are_compared_as_written():
    assert vqa_score("none", ["none"] * 10) == 30
    assert vqa_score("0", ["none"] * 10) == 0
    assert vqa_score("0", ["none"] * 9 + ["1"]) == 30


def test_accuracy_needs_ten_answers_and_as_many_predictions():
    with pytest.raises(ValueError, match="ten answers a question, got 1"):
        VQAAccuracy().update(["yes"], [["yes"]])
    with pytest.raises(ValueError, match="longer"):
        VQAAccuracy().update(["yes"], [["yes"] * 10] * 2)


KEEP = torch.tensor([[True, True, False], [True, False, False]])
UPDATES = {
    VQAAccuracy: [(["2"], [["2"] * 2 + ["3"] * 8]), (["no", "a dog"], [["no"] * 10, ["dog"] * 9 + ["cat"]])],
    Agreement: [(torch.tensor([True, False, False]),), (torch.tensor([True, True]),)],
    TokensKept: [(KEEP, torch.tensor([3, 1])), (KEEP[:1],)],
}
VALUES = {
    VQAAccuracy: torch.tensor((18 + 30 + 30) / 90),
    Agreement: torch.tensor(0.6),
    TokensKept: {"tokens_kept": torch.tensor(5 / 3), "keep_share": torch.tensor(5 / 7)},
}


@pytest.mark.parametrize("kind", UPDATES)
def test_two_processes_count_as_one(kind):
    first, second = kind(), kind()
    first.update(*UPDATES[kind][0])
    second.update(*UPDATES[kind][1])
    first.merge_state(second)
    torch.testing.assert_close(first.compute(), VALUES[kind], atol=1e-7, rtol=0)


@pytest.mark.parametrize("kind", UPDATES)
def test_state_reset_in_inference_mode_counts_outside_it(kind):
    metric: Metric = kind()
    with torch.inference_mode():
        metric.update(*UPDATES[kind][0])
        metric.reset()
    for update in UPDATES[kind]:
        metric.update(*update)
    torch.testing.assert_close(metric.compute(), VALUES[kind], atol=1e-7, rtol=0)


@pytest.mark.parametrize("kind", UPDATES)
def test_counts_stay_exact_under_half_precision(kind):
    metric = torch.nn.ModuleList([kind()]).to(torch.bfloat16)[0]
    for _ in range(300):  # bfloat16 counts to 256
        for update in UPDATES[kind]:
            metric.update(*update)
    torch.testing.assert_close(metric.compute(), VALUES[kind], atol=1e-7, rtol=0)


def test_wilson_interval_agrees_with_the_published_numbers():
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(10, 10, confidence=0.9)[1] == 1.0


@pytest.mark.parametrize("arguments", [(0, 0), (4, 3), (-1, 3), (1, 3, 1.5)])
def test_wilson_interval_refuses_counts_that_cannot_be(arguments):
    with pytest.raises(ValueError, match="must"):
        wilson_interval(*arguments)


def test_metrics_refuse_other_types_and_shapes():
    with pytest.raises(ValueError, match=r"bool tensor, got torch\.float32"):
        Agreement().update(torch.ones(3))
    with pytest.raises(ValueError, match=r"bool \[B, T\], got torch\.bool \[3\]"):
        TokensKept().update(KEEP[0])
    with pytest.raises(ValueError, match=r"visual must be \[2\]"):
        TokensKept().update(KEEP, torch.tensor(3))
