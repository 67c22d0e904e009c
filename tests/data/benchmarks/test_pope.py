"""Questions of POPE, in the layout of the authors' files."""

from pathlib import Path
from typing import Any

import pytest

from catp_lightning.errors import DataError
from tests.support.benchmark_files import pope


def test_questions_are_read_with_their_label(tmp_path: Path) -> None:
    records = pope(tmp_path).records()
    assert records[0] == (1, "COCO_val2014_000000000000.jpg", "Is there a snowboard in the image?", "yes", 1)
    assert [record.reference for record in records] == ["yes", "no"] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "maybe"}, "line 2: 'label' is 'maybe'; it is 'yes' or 'no'"),
        ({"label": None}, "line 2 is not in POPE's layout: 'label' must be str, got None"),
        ({"text": 3}, "'text' must be str, got 3"),
        ({"question_id": "2"}, "'question_id' must be int, got '2'"),
        ({"question_id": 2**63}, "a whole number of 64 bits"),
        ({"text": "\ud800"}, "half a character is missing"),
    ],
)
def test_what_is_not_in_the_layout_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        pope(tmp_path, **change).records()
