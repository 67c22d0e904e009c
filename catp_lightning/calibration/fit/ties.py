"""Tolerance for ties: other batches and processes compute and add in another order, and must decide alike."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    """Tolerance within which numbers are tied; ties are broken by place, so that no decision depends on rounding.

    Attributes:
        relative: largest difference of tied numbers, as a share of their scale.
    """

    relative: float

    @classmethod
    def under(cls, dtype: torch.dtype) -> "Tolerance":
        """Return the tolerance for a model that computes in `dtype`: some hundred times the effect of its batch order.

        >>> Tolerance.under(torch.float64), Tolerance.under(torch.float32)
        (Tolerance(relative=1e-09), Tolerance(relative=0.0001))
        """
        return cls(1e-9 if dtype == torch.float64 else 1e-4)

    def order(self, values: Sequence[float], scale: float) -> list[int]:
        """Return places, smallest value first; values that tie with the first of their group stay in their own order.

        Args:
            values: numbers to be compared.
            scale: scale of the values; a group's smallest value leads it, and its own size is the scale if larger.

        >>> Tolerance(1e-4).order([0.30001, 0.1, 0.3, 0.2], scale=0.01)
        [1, 3, 0, 2]
        """
        ascending = sorted(range(len(values)), key=lambda place: values[place])
        groups: list[list[int]] = []
        for place in ascending:
            leader = values[groups[-1][0]] if groups else 0.0
            if groups and values[place] - leader <= self.relative * max(abs(leader), scale):
                groups[-1].append(place)
            else:
                groups.append([place])
        return [place for group in groups for place in sorted(group)]
