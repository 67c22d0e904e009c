"""Regions of an image, one for each row that a compressor writes, and the tokens at whose places rows are written."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from catp_lightning.methods.observation import Observation, Signal
from catp_lightning.utils.on_cpu import of_known, on_cpu, on_device

SIDE = 3
"""Cells along each side of a region."""


@dataclass(frozen=True)
class Regions:
    """Partition of the tokens of images into R regions each; I images, T tokens of the largest.

    Attributes:
        own: bool [I, T], tokens that belong to a region: all but protected ones.
        region: int64 [I, T], region of each token; 0 where `own` is False.
        cell: int64 [I, T], cell of its region, in 3 x 3, line by line, that each token lies in.
        place: float64 [I, T, 2], line and column of each token, in units of a region's sides.
        centre: float64 [I, R, 2], the same of the middle of each region.
        at: int64 [I, N], the tokens at whose places N rows are written: the middle token of each region, then the last
            tokens that are in no region's middle.
    """

    own: Tensor
    region: Tensor
    cell: Tensor
    place: Tensor
    centre: Tensor
    at: Tensor


def compressed(seen: Observation, tokens: int) -> Tensor:
    """Return which images have more than `tokens` tokens that may be dropped: bool [I]."""
    return of_known(lambda own: own.sum(1) > tokens, seen.droppable)


def regions(seen: Observation, count: int, further: int, on_grid: bool) -> Regions:
    """Partition images, each of more than `count + further` tokens that may be dropped.

    The regions are rectangles of the image's grid, as near to squares as `count` allows: 16 are 4 x 4 in a square image
    and 2 x 8 in one four times as wide. Where the grid is not known, is not whole (crops, pruned patches), or is too
    small for such rectangles, they are stretches of the sequence.

    Args:
        seen: the images; with `on_grid` they have `Signal.PATCH_POSITION`.
        count: number of regions, R.
        further: number of rows that are written beside those of the regions.
        on_grid: True if tokens may be patches of a grid.
    """
    own = on_cpu(seen.droppable)[0]
    counts = own.sum(1).tolist()
    shapes = _shapes(own, seen[Signal.PATCH_POSITION]) if on_grid else [(1, number) for number in counts]
    region, cell = (torch.zeros(own.shape, dtype=torch.int64, device="cpu") for _ in range(2))
    place = torch.zeros(*own.shape, 2, dtype=torch.float64, device="cpu")
    at = torch.zeros(len(counts), count + further, dtype=torch.int64, device="cpu")
    centre = torch.zeros(len(counts), count, 2, dtype=torch.float64, device="cpu")
    for image, (high, wide) in enumerate(shapes):
        columns = own[image].nonzero()[:, 0]
        of_token, middles, chosen = _table(high, wide, count, further)
        region[image, columns], cell[image, columns] = of_token[:, 0].long(), of_token[:, 1].long()
        place[image, columns], centre[image], at[image] = of_token[:, 2:], middles, columns[chosen]
    return Regions(seen.droppable, *(on_device(part, seen.valid.device) for part in (region, cell, place, centre, at)))


def _shapes(own: Tensor, places: Tensor) -> list[tuple[int, int]]:
    """Return lines and columns of each image's tokens; one line where they are not all patches of one grid in order.

    Args:
        own: bool [I, T] on the CPU, tokens that may be dropped.
        places: int64 [I, T, 3], as `Signal.PATCH_POSITION`.
    """
    count = own.sum(1)
    part, line, column = on_cpu(places)[0].masked_fill(~own[..., None], 0).unbind(-1)
    high, wide = line.amax(1) + 1, column.amax(1) + 1
    in_order = (line * wide[:, None] + column == own.cumsum(1) - 1) | ~own
    one_part = (part == part.amax(1, keepdim=True)) | ~own
    known = (high * wide == count) & (in_order & one_part).all(1)
    found = torch.stack([high.where(known, 1), wide.where(known, count)], 1)
    return [(high, wide) for high, wide in found.tolist()]


@lru_cache(maxsize=64)
def _table(high: int, wide: int, count: int, further: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the partition of one image of `high` lines and `wide` columns.

    Returns:
        float64 [high * wide, 4], of each token region, cell, line and column in units of a region; float64 [count, 2],
        the middles of the regions; int64 [count + further], the tokens that rows are written at.
    """
    lines, columns = shape(high, wide, count)
    if lines > high or columns > wide:
        high, wide, lines, columns = 1, high * wide, 1, count
    of_token = []
    for line in range(high):
        for column in range(wide):
            own = line * lines // high, column * columns // wide
            inner = line * lines * SIDE // high - own[0] * SIDE, column * columns * SIDE // wide - own[1] * SIDE
            place = (line + 0.5) * lines / high, (column + 0.5) * columns / wide
            of_token.append([own[0] * columns + own[1], inner[0] * SIDE + inner[1], *place])
    each = [(line + 0.5, column + 0.5) for line in range(lines) for column in range(columns)]
    middles = [[_middle(part, *axis) for part in range(axis[0])] for axis in ((lines, high), (columns, wide))]
    at = [line * wide + column for line in middles[0] for column in middles[1]]
    rest = [token for token in range(high * wide) if token not in at]
    at += rest[len(rest) - further :]
    return (
        torch.tensor(of_token, dtype=torch.float64, device="cpu"),
        torch.tensor(each, dtype=torch.float64, device="cpu"),
        torch.tensor(at, dtype=torch.int64, device="cpu"),
    )


def _middle(part: int, parts: int, size: int) -> int:
    """Return the middle, the first of two, of one of `parts` stretches of `size`; part p begins at p * size / parts."""
    first, after = -(-part * size // parts), -(-(part + 1) * size // parts)
    return (first + after - 1) // 2


def shape(high: int, wide: int, count: int) -> tuple[int, int]:
    """Return lines and columns of `count` regions of an image: those that are nearest to squares, the wider of two.

    Where no two factors of `count` fit into the image, the result does not either.

    >>> shape(12, 12, 16), shape(12, 12, 8), shape(4, 40, 16), shape(1, 32, 8), shape(2, 9, 7)
    ((4, 4), (2, 4), (1, 16), (1, 8), (1, 7))
    """
    pairs = [(lines, count // lines) for lines in range(1, count + 1) if count % lines == 0]
    fitting = [pair for pair in pairs if pair[0] <= high and pair[1] <= wide] or pairs
    return min(fitting, key=lambda pair: (round(abs(math.log(high * pair[1] / (wide * pair[0]))), 6), pair[0]))
