"""Boxes in answers, and their overlap with the right ones."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catp_lightning.data.benchmarks.references import Box
from catp_lightning.metrics.benchmarks import RefCOCOAccuracy
from catp_lightning.metrics.benchmarks.refcoco import box_in, overlap


@pytest.mark.parametrize(
    ("answer", "box"),
    [
        ("(1,2),(3,4)", (1, 2, 3, 4)),
        ("<ref>the man</ref><box>(10,20),(300,999)</box>", (10, 20, 300, 999)),
        ("[0.12, 0.3, 0.55, 1]", (0.12, 0.3, 0.55, 1)),
        ('```json\n[{"bbox_2d": [12, 3, 55, 100], "label": "man"}]\n```', (12, 3, 55, 100)),
        ("The 2 men are at [[1, 2, 3, 4]]", (1, 2, 3, 4)),
        ("1 2 3 4", (1, 2, 3, 4)),
        ("1 2 3 4 5", (1, 2, 3, 4)),
        ("-1,2,3,4", (-1, 2, 3, 4)),
        ("1, 2, 3", None),
        ("1, 2, 3, four", None),
        ("x1 2 3 4", None),
        ("", None),
    ],
)
def test_the_first_four_numbers_in_a_row_are_the_box(answer: str, box: tuple[float, ...] | None) -> None:
    assert box_in(answer) == box


corners = st.tuples(*[st.integers(0, 6)] * 4)


@settings(max_examples=100)
@given(corners, corners.filter(lambda box: box[0] < box[2] and box[1] < box[3]))
def test_overlaps_are_those_of_counted_squares(answer: tuple[int, int, int, int], right: tuple[int, ...]) -> None:
    def squares(box: tuple[int, ...]) -> set[tuple[int, int]]:
        return set(itertools.product(range(box[0], box[2]), range(box[1], box[3])))

    one, other = squares(answer), squares(right)
    expected = len(one & other) / len(one | other)
    assert overlap(answer, Box(*right, 1, 1)) == pytest.approx(expected)
    metric = RefCOCOAccuracy()
    metric.update(["({},{}),({},{})".format(*answer)], [Box(*right, 1, 1)])
    assert metric.compute()["accuracy"].item() == (expected >= 0.5)


def test_answers_are_measured_in_their_own_units() -> None:
    metric = RefCOCOAccuracy()
    box = Box(0, 0, 320, 480, x_unit=0.64, y_unit=0.48)  # an image of 640 x 480, answers from 0 to 1000
    metric.update(["(0,0),(500,1000)", "(0,0),(320,480)"], [box] * 2)
    assert metric.compute()["accuracy"].item() == 0.5
