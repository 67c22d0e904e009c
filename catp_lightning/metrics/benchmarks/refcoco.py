"""Accuracy of boxes, on RefCOCO and its like."""

import re

from catp_lightning.data.benchmarks.references import Box
from catp_lightning.metrics.benchmarks.mean_score import MeanScore

ENOUGH = 0.5
"""Intersection over union from which a box is right."""

_NUMBER = r"(-?\d{1,9}(?:\.\d{1,30})?)"
_BOX = re.compile(r"(?<![\w.])" + r"[\s,()\[\]]+".join([_NUMBER] * 4) + r"(?![\w.]*\d)")
"""Four numbers with nothing but commas, spaces and brackets between them."""


def box_in(answer: str) -> tuple[float, float, float, float] | None:
    """Return the first four numbers in a row in an answer, as left, top, right and bottom, or None.

    >>> box_in("<box>(10,20),(30,40)</box>"), box_in('{"bbox_2d": [0.1, 0.2, 0.3, 0.4]}'), box_in("it has 4 legs")
    ((10.0, 20.0, 30.0, 40.0), (0.1, 0.2, 0.3, 0.4), None)
    """
    found = _BOX.search(answer)
    if found is None:
        return None
    left, top, right, bottom = map(float, found.groups())
    return left, top, right, bottom


def overlap(answer: tuple[float, float, float, float], box: Box) -> float:
    """Return the intersection over union of a box in an answer's units and a reference, in [0, 1].

    >>> overlap((0, 0, 1000, 500), Box(0, 0, 64, 48, x_unit=0.064, y_unit=0.048))
    0.5
    """
    left, right = answer[0] * box.x_unit, answer[2] * box.x_unit
    top, bottom = answer[1] * box.y_unit, answer[3] * box.y_unit
    width = min(right, box.right) - max(left, box.left)
    height = min(bottom, box.bottom) - max(top, box.top)
    if width <= 0 or height <= 0 or right <= left or bottom <= top:
        return 0.0
    both = width * height
    return both / ((right - left) * (bottom - top) + (box.right - box.left) * (box.bottom - box.top) - both)


class RefCOCOAccuracy(MeanScore):
    """Share of boxes whose intersection over union with the right one is at least 0.5, in [0, 1].

    Areas are those of the plane, without the pixel that some scripts add to a side, as in Qwen-VL's evaluation. An
    answer without a box, or with one whose right is not beyond its left, is wrong.

    >>> accuracy = RefCOCOAccuracy()
    >>> accuracy.update(["(0,0),(30,48)", "(0,0),(32,48)"], [Box(0, 0, 64, 48, x_unit=1, y_unit=1)] * 2)
    >>> accuracy.compute()
    {'accuracy': tensor(0.5000)}
    """

    def points(self, prediction: str, reference: Box) -> int:
        """Return 1 if a prediction is the right box, else 0."""
        box = box_in(prediction)
        return int(box is not None and overlap(box, reference) >= ENOUGH)
