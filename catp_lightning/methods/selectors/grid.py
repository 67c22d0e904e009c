"""Keeps evenly spaced rows and columns of an image: the two-dimensional control."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from typing import ClassVar

import torch
from torch import Tensor

from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.selection import Selection
from catp_lightning.methods.selectors.base import Selector
from catp_lightning.utils.on_cpu import on_cpu, on_device


@dataclass(frozen=True)
class Grid(Selector):
    """Keeps evenly spaced patches of evenly spaced rows, as far apart down as across; scores are ignored.

    To keep n patches of an image of R rows of W patches, round(sqrt(n R / W)) rows are used, each at the middle of an
    equal share of the image, and in each row the same number of patches, placed likewise: at keep 1/4, every second row
    and column. Crops and tiles each get a share of the budget by their size. A token that stands for no patch, such as
    the [CLS] of a tile, is kept last. Where the grid of an image is not known, its tokens count as one row.
    """

    nested: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.per == "sample":
            raise ValueError('per is "sample"; rows and columns are those of one image: "image" or "crop".')

    @property
    def needs(self) -> Needs:
        return {Signal.PATCH_POSITION: None}

    def vectors(self, seen: Observation) -> Tensor:
        """Part (crop or tile), row and column of each token's patch: int64 [I, T, 3]; row -1: no patch."""
        return seen[Signal.PATCH_POSITION]

    def select(self, scores: Tensor, visual: Tensor, counts: Tensor, vectors: Tensor | None) -> Selection:
        assert vectors is not None  # `vectors` above always gives some
        patches_of, own, asked = on_cpu(vectors, visual, counts)
        places = patches_of[..., :2].tolist()  # part and row
        keep = torch.zeros(visual.shape, dtype=torch.bool, device="cpu")
        for image, (there, count) in enumerate(zip(own.tolist(), asked.tolist(), strict=True)):
            tokens = [token for token, valid in enumerate(there) if valid]
            patches = [token for token in tokens if places[image][token][1] >= 0]
            others = [token for token in tokens if not places[image][token][1] >= 0]  # NaN too
            lines = [(part, len(list(row))) for (part, _), row in groupby(places[image][token] for token in patches)]
            widths = tuple(tuple(width for _, width in own) for _, own in groupby(lines, key=lambda line: line[0]))
            chosen = spread(widths, min(count, len(patches)))
            keep[image, [patches[place] for place in chosen] + others[: count - len(chosen)]] = True
        return Selection(on_device(keep, visual.device))


@lru_cache(maxsize=1024)
def spread(widths: tuple[tuple[int, ...], ...], count: int) -> tuple[int, ...]:
    """Indices, ascending, of `count` evenly spaced patches of an image.

    Args:
        widths: number of patches in each row of each part (crop or tile) of the image.
        count: number of patches to choose, at most all of them.

    >>> spread(((4, 4, 4, 4),), 4), spread(((3, 3), (1,)), 7)
    ((5, 7, 13, 15), (0, 1, 2, 3, 4, 5, 6))
    """
    found, first = [], 0
    for rows, own in zip(widths, _shares([sum(rows) for rows in widths], count), strict=True):
        starts = [first + sum(rows[:row]) for row in range(len(rows))]
        chosen = _chosen_rows(rows, own)
        for row, some in zip(chosen, _shares([rows[row] for row in chosen], own), strict=True):
            found += [starts[row] + place for place in _middles(rows[row], some)]
        first += sum(rows)
    return tuple(found)


def _chosen_rows(widths: Sequence[int], count: int) -> list[int]:
    """Rows of a part over which `count` patches are spread; more rows where the planned ones cannot hold them all."""
    if count == 0:
        return []
    several = max(1, min(len(widths), count, round((count * len(widths) ** 2 / sum(widths)) ** 0.5)))
    while sum(widths[row] for row in _middles(len(widths), several)) < count:
        several += 1
    return _middles(len(widths), several)


def _middles(length: int, count: int) -> list[int]:
    """Indices of the middles of `count` equal shares of `length` places."""
    return [(2 * share + 1) * length // (2 * count) for share in range(count)]


def _shares(sizes: Sequence[int], count: int) -> list[int]:
    """Divide `count`, at most the sum of `sizes`, in proportion to `sizes`; no share exceeds its size."""
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    return (
        [count * after // ends[-1] - count * before // ends[-1] for before, after in pairwise(ends)] if ends[-1] else []
    )
