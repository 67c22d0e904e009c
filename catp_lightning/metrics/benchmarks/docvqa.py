"""Average normalised Levenshtein similarity (ANLS), on DocVQA."""

from collections.abc import Sequence
from typing import ClassVar

from catp_lightning.metrics.benchmarks.mean_score import MeanScore

THRESHOLD = 0.5
"""Similarity below which an answer scores 0."""


def edit_distance(one: str, other: str) -> int:
    """Least number of characters to insert, delete or replace that makes one text the other (Levenshtein).

    >>> edit_distance("kitten", "sitting"), edit_distance("", "abc")
    (3, 3)
    """
    row = list(range(len(other) + 1))
    for place, sign in enumerate(one, start=1):
        above, row = row, [place]
        for column, found in enumerate(other):
            row.append(above[column] if sign == found else 1 + min(above[column], above[column + 1], row[-1]))
    return row[-1]


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Return the similarity of a prediction to the nearest of several answers, in [0, 1]; below 0.5 it is 0.

    It is 1 minus the edit distance over the length of the longer text. As in the challenge's script, letter case and
    repeated spaces do not count in the distance, and lengths are those of the texts as they were written.

    >>> anls("Hello  World", ["hello world"]), anls("hallo", ["hello", "x"]), anls("abc", ["xyz"])
    (1.0, 0.8, 0.0)
    """
    distances = []
    for answer in answers:
        length = max(len(answer), len(prediction))
        distance = edit_distance(*(" ".join(text.lower().split()) for text in (answer, prediction)))
        distances.append(distance / length if length else 0.0)
    similarity = 1 - min(distances)
    return similarity if similarity >= THRESHOLD else 0.0


class ANLS(MeanScore):
    """Mean of `anls` over questions, in [0, 1], as the script of the Robust Reading Competition does (DocVQA).

    >>> metric = ANLS()
    >>> metric.update(["1/8/93", "ITC limited"], [["1/8/93"], ["itc limited", "ITC Ltd"]])
    >>> metric.compute()
    {'anls': tensor(1.)}
    """

    unit: ClassVar[int] = 2**40  # sums of 8 million questions fit into 64 bits
    figure: ClassVar[str] = "anls"

    def points(self, prediction: str, reference: Sequence[str]) -> int:
        """Return the similarity in units of 2**-40."""
        return round(anls(prediction, reference) * self.unit)
