"""Keeps means over the cells of a coarser grid: the image at a lower resolution."""

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from catp_lightning.errors import PruningError
from catp_lightning.methods.observation import Observation
from catp_lightning.methods.selection import Selection
from catp_lightning.methods.selectors.base import Selector
from catp_lightning.utils.on_cpu import on_cpu, on_device


@dataclass(frozen=True)
class Pool(Selector):
    """Keeps each cell of a coarser grid as the mean of its tokens, in the place of the one nearest to its centre.

    The grid is the one with the most cells that the budget allows, and among those the one nearest to a square, the
    wider of two; the rest of the budget is not used (13 tokens of a 12 x 12 image are 3 x 4 cells). Sides of cells
    differ by one token at most. Of tokens equally near to a centre the first is taken. Scores are ignored.

    Raises:
        PruningError: tokens are not known to be the patches of one square image, line by line.
    """

    nested: ClassVar[bool] = False
    merges: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.per != "image":
            raise ValueError(f'per is {self.per!r}; means over the cells of an image\'s grid are for each "image".')

    def vectors(self, seen: Observation) -> Tensor:
        """Line and column of each token in its square image: float [I, T, 2], 0 where an image has no token.

        Raises:
            PruningError: tokens are not known to be the patches of one square image, line by line.
        """
        valid, droppable = on_cpu(seen.valid, seen.droppable)
        if seen.crops is not None or not bool((droppable == valid).all()):
            raise _refused("they are of several crops, or have line ends or a [CLS] among them")
        counts = valid.sum(1)
        sides = counts.float().sqrt().round().long()
        if not bool((sides**2 == counts).all()):
            raise _refused(f"an image has {int(counts[sides**2 != counts][0])} of them, which is not a square number")
        place = valid.cumsum(1) - 1
        lines = torch.stack([place // sides[:, None].clamp(min=1), place % sides[:, None].clamp(min=1)], -1)
        return on_device((lines * valid[..., None]).float(), seen.valid.device)

    def select(self, scores: Tensor, visual: Tensor, counts: Tensor, vectors: Tensor | None) -> Selection:
        destination = _destinations(visual, counts, vectors)
        return Selection(destination == torch.arange(visual.shape[1], device=visual.device), destination)


def _refused(reason: str) -> PruningError:
    return PruningError(
        f"Tokens are averaged over a square grid, and those of this model form none: {reason}. Use it on a LLaVA-1.5, "
        "or choose another control: stride works on every model."
    )


def _destinations(visual: Tensor, counts: Tensor, vectors: Tensor | None) -> Tensor:
    """Index of the token that each token is merged into: int64 [R, T], -1 where a row has no token.

    Args:
        visual: bool [R, T], True where a row has a token.
        counts: int64 [R], budget of each row.
        vectors: float [R, T, 2], line and column of each token.
    """
    assert vectors is not None  # `vectors` above always gives some
    there, asked, lines = on_cpu(visual, counts, vectors)
    found = torch.full(there.shape, -1, device="cpu", dtype=torch.int64)
    for row, (own, count) in enumerate(zip(there.sum(1).tolist(), asked.tolist(), strict=True)):
        if own:
            table = torch.tensor(_table(math.isqrt(own), count), device="cpu", dtype=torch.int64)
            columns = there[row].nonzero()[:, 0]
            line, column = lines[row, columns].long().unbind(1)
            found[row, columns] = columns[table[line, column]]
    return on_device(found, visual.device)


@cache
def _table(side: int, count: int) -> list[list[int]]:
    """Index, counted line by line, of the token that the one at each [line][column] of a square image."""
    high, wide = grid(side, count)
    centre = [[_middle(place, cells, side) for place in range(side)] for cells in (high, wide)]
    return [[centre[0][line] * side + centre[1][column] for column in range(side)] for line in range(side)]


def _middle(place: int, cells: int, side: int) -> int:
    """Middle line of the cell that line `place` belongs to, the first of two; cell c begins at c * side / cells."""
    cell = place * cells // side
    first, after = -(-cell * side // cells), -(-(cell + 1) * side // cells)
    return (first + after - 1) // 2


def grid(side: int, count: int) -> tuple[int, int]:
    """Lines and columns of the grid with the most cells, at most `count`; of several, the one nearest to a square.

    >>> grid(12, 36), grid(12, 18), grid(12, 13), grid(12, 7), grid(3, 9)
    ((6, 6), (3, 6), (3, 4), (1, 7), (3, 3))
    """
    shapes = [(high, min(side, count // high)) for high in range(1, min(side, math.isqrt(count)) + 1)]
    return max(shapes, key=lambda shape: (shape[0] * shape[1], shape[0]))
