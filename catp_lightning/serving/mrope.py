"""Positions by time, row and column of prompts whose images were shortened: each token stands where it stood."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BASE = 256
"""Whole numbers up to this one are exact in every floating type, bfloat16 included."""


@dataclass(frozen=True)
class Span:
    """Image in a prompt.

    Attributes:
        start: index of its first token in the prompt.
        tokens: number of its tokens that stay.
        rows, columns: its grid before any left, in tokens.
    """

    start: int
    tokens: int
    rows: int
    columns: int


def prompt_positions(length: int, images: Sequence[Span]) -> tuple[Tensor, int]:
    """Return the positions of a prompt before it is known which tokens of its images stay.

    Text stands where it stands in the whole prompt: behind an image at the larger of its rows and columns. All tokens
    of an image are at its first place, until `placed` puts them where they belong.

    Args:
        length: number of tokens of the shortened prompt, N.
        images: its images, in order; all have one step of time.

    Returns:
        Positions by time, row and column, int64 [3, N], and what is added to the index of a later token to get its
        position.
    """
    positions = torch.empty(length, dtype=torch.int64, device="cpu")
    at = shift = 0  # shift: position of a text token minus its index
    for image in images:
        end = image.start + image.tokens
        positions[at : image.start] = torch.arange(at, image.start, device="cpu") + shift
        positions[image.start : end] = image.start + shift
        at, shift = end, image.start + shift + max(image.rows, image.columns) - end
    positions[at:] = torch.arange(at, length, device="cpu") + shift
    return positions.expand(3, -1).clone(), shift


def placed(positions: Tensor, is_image: Tensor, first: int, places: Tensor) -> Tensor:
    """Return positions with some of the image tokens where they belong.

    Args:
        positions: int64 [3, N], as `prompt_positions` gives them; it does not matter whether some are placed already.
        is_image: bool [N], the tokens of images; a token of text stands before each image.
        first: index of the first token that is now computed.
        places: int64 [K, 2], row and column of the next K image tokens from there on, in their order.
    """
    index = torch.arange(len(is_image), device=is_image.device)
    before = index.masked_fill(is_image, -1).cummax(0).values  # the last token of text up to here
    own = index[is_image & (index >= first)][: len(places)]
    start = positions[0, before[own]] + 1
    found = positions.clone()
    found[:, own] = start + torch.stack([torch.zeros_like(places[:, 0]), places[:, 0], places[:, 1]])
    return found


def written(places: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows and columns as numbers that every floating type holds: int64 [K, 2] -> [K, 4], below 256 each."""
    return torch.cat([places // BASE, places % BASE], 1).to(dtype)


def read(numbers: Tensor) -> Tensor:
    """Return rows and columns from what `written` gave: [K, 4] -> int64 [K, 2].

    >>> read(written(torch.tensor([[0, 3], [1799, 257]]), torch.bfloat16))
    tensor([[   0,    3],
            [1799,  257]])
    """
    high, low = numbers.long().chunk(2, 1)
    return high * BASE + low
