"""Rows of visual tokens that are written anew: means of merged tokens, or what a compressor makes of all."""

import torch
from torch import Tensor

from catp_lightning.prompt.prompt import columns_of_tokens, visual_tokens
from catp_lightning.utils.on_cpu import of_known, places, taken
from catp_lightning.utils.rows import add_rows


def merged(rows: Tensor, visual: Tensor, destination: Tensor) -> Tensor:
    """Return rows in which a visual token that others are merged into is the mean of all of them, itself included.

    Args:
        rows: float [R, L, D]; R is B samples times the beams, which lie next to each other. visual: bool [B, L], the
        visual tokens among them. destination: int64 [B, T], for each visual token the one that it is merged into:
        itself, or one that stays; -1: none.
    """
    columns = columns_of_tokens(visual)
    every = destinations(visual, columns, columns, destination)
    return merge_groups(rows, every.repeat_interleave(len(rows) // len(visual), 0))


def destinations(visual: Tensor, columns: Tensor, places: Tensor, destination: Tensor) -> Tensor:
    """Return for each column the place of the row that it is merged into, int64 [B, L]; -1: none, as of text.

    Args:
        visual: bool [B, L], the columns of visual tokens.
        columns: int64 [B, T], the column of each visual token, as from `columns_of_tokens`.
        places: int64 [B, T], the place of each visual token's row.
        destination: int64 [B, T], or of more tokens, for each visual token the one that it is merged into; -1: none.
    """
    tokens, length = visual_tokens(visual), visual.shape[1]
    destination = destination[:, : tokens.shape[1]]
    to = places.gather(1, destination.clamp(min=0)).masked_fill(destination < 0, -1)
    every = to.new_full((len(to), length + 1), -1)  # of all columns, and one that stands for tokens there are not
    return every.scatter(1, columns.where(tokens, length), to)[:, :length]


def written(rows: Tensor, visual: Tensor, values: Tensor) -> Tensor:
    """Return rows in which visual tokens are replaced.

    Args:
        rows: float [R, L, D]; R is B samples times the beams, which lie next to each other.
        visual: bool [B, L], the visual tokens among them.
        values: float [B, T, D], what to write in the place of each visual token, in their order.
    """
    beams = len(rows) // len(visual)
    visual, values = _of_beams(visual, beams), values.repeat_interleave(beams, 0)
    tokens = visual_tokens(visual)
    own = taken(values[:, : tokens.shape[1]], tokens).to(rows.dtype)
    return rows.flatten(0, 1).index_copy(0, places(visual, rows), own).view_as(rows)


def _of_beams(values: Tensor, beams: int) -> Tensor:
    return of_known(lambda part: part.repeat_interleave(beams, 0), values)


def merged_features(flat: Tensor, tokens: Tensor, destination: Tensor) -> Tensor:
    """Return features of visual tokens in which a token that others are merged into is the mean of all of them.

    Args:
        flat: float [N, D], features of all N visual tokens, one after the other.
        tokens: bool [R, T], the visual tokens that each row has.
        destination: int64 [R, T], for each visual token the one that it is merged into; -1: none.
    """
    at = places(tokens, flat)
    values = flat.new_zeros(tokens.numel(), flat.shape[-1]).index_copy(0, at, flat).view(*tokens.shape, -1)
    merged_values = merge_groups(values, destination[:, : tokens.shape[1]].masked_fill(~tokens, -1))
    return merged_values.flatten(0, 1)[at]


def merge_groups(values: Tensor, destination: Tensor) -> Tensor:
    """Replace the token that a group is merged into by the group's mean; others stay as they were.

    Args:
        values: float [B, T, D].
        destination: int64 [B, T], the token that each is merged into; -1: none.

    >>> merge_groups(torch.tensor([[[1.0], [4.0], [3.0], [9.0]]]), torch.tensor([[0, 1, 0, -1]]))[0, :, 0]
    tensor([2., 4., 3., 9.])
    """
    wide, length = values.to(torch.promote_types(values.dtype, torch.float32)), values.shape[1]
    index = destination.where(destination >= 0, length)  # the last place is of those that are merged into none
    total, count = (add_rows(each, index, length + 1)[:, :length] for each in (wide, torch.ones_like(wide[..., 0])))
    leads = (destination == torch.arange(length, dtype=torch.int64, device=destination.device)) & (count > 1)
    return torch.where(leads[..., None], total / count.clamp(min=1)[..., None], wide).to(values.dtype)
