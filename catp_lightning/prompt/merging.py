"""Merging: a token that carries others becomes the mean of all it carries."""

import torch
from torch import Tensor

from catp_lightning.prompt.prompt import visual_tokens


def merged(rows: Tensor, visual: Tensor, carrier: Tensor) -> Tensor:
    """Return rows in which a visual token that carries others is the mean of all it carries, itself among them.

    Args:
        rows: float [R, L, D]; R is B samples times the beams, which lie next to each other.
        visual: bool [B, L], the visual tokens among them.
        carrier: int64 [B, T], for each visual token the one whose row carries it: itself, or one that stays; -1: none.
    """
    beams = len(rows) // len(visual)
    visual, carrier = visual.repeat_interleave(beams, 0), carrier.repeat_interleave(beams, 0)
    rows = rows.clone()
    rows[visual] = merged_features(rows[visual], visual_tokens(visual), carrier)
    return rows


def merged_features(flat: Tensor, tokens: Tensor, carrier: Tensor) -> Tensor:
    """Return features of visual tokens in which a token that carries others is the mean of all it carries.

    Args:
        flat: float [N, D], features of all N visual tokens, one after the other.
        tokens: bool [R, T], the visual tokens that each row has.
        carrier: int64 [R, T], for each visual token the one whose row carries it; -1: none.
    """
    values = flat.new_zeros(*tokens.shape, flat.shape[-1])
    values[tokens] = flat
    return group_means(values, carrier[:, : tokens.shape[1]].masked_fill(~tokens, -1))[tokens]


def group_means(values: Tensor, carrier: Tensor) -> Tensor:
    """Replace the token that carries a group by the group's mean; others stay as they were.

    Args:
        values: float [B, T, D].
        carrier: int64 [B, T], the token that carries each; -1: none.

    >>> group_means(torch.tensor([[[1.0], [4.0], [3.0], [9.0]]]), torch.tensor([[0, 1, 0, -1]]))[0, :, 0]
    tensor([2., 4., 3., 9.])
    """
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    joins = (carrier >= 0).to(wide.dtype)
    index = carrier.clamp(min=0)
    joining = wide.masked_fill(carrier[..., None] < 0, 0)  # a product with 0 would keep NaN and infinities
    total = torch.zeros_like(wide).scatter_add(1, index[..., None].expand_as(wide), joining)
    count = torch.zeros_like(joins).scatter_add(1, index, joins)
    leads = (carrier == torch.arange(carrier.shape[1], device=carrier.device)) & (count > 1)
    return torch.where(leads[..., None], total / count.clamp(min=1)[..., None], wide).to(values.dtype)
