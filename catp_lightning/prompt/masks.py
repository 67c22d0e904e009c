"""Attention masks of a shortened prompt; windows of sliding attention are counted in original columns."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig

from catp_lightning.errors import PruningError
from catp_lightning.prompt.kept import KeptSequence

Masks = Tensor | dict[str, Tensor]
RECURRENT = {"conv", "linear_attention"}
"""Types of layers that read rows in turn and hold a state of fixed size; their mask is [R, L], 0 for padding."""


def recurrent(config: PreTrainedConfig) -> bool:
    """Return True if some layers of a decoder are recurrent: of linear attention, or short convolutions."""
    return not RECURRENT.isdisjoint(getattr(config, "layer_types", None) or ())


def window(config: PreTrainedConfig) -> int | None:
    """Return the number of columns that a sliding-attention layer sees; None if no layer slides."""
    types = getattr(config, "layer_types", None)
    size = getattr(config, "sliding_window", None)
    return size if size and (types is None or "sliding_attention" in types) else None


def two_dimensional(mask: Any, rows: int, length: int, device: torch.device) -> Tensor:
    """Return the caller's attention mask as int64 [R, L], ones if there is none: generate leaves out a mask of ones.

    Raises:
        PruningError: the mask has another shape.
    """
    if mask is None:
        return torch.ones(rows, length, dtype=torch.long, device=device)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] != length:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise PruningError(
            f"attention_mask is {shape}; a prompt can be pruned under a mask of shape [batch, length], here "
            f"[{rows}, {length}]."
        )
    return mask.to(device=device, dtype=torch.int64)


def prefill_masks(mask_argument: Any, prompt: KeptSequence, config: PreTrainedConfig, dtype: torch.dtype) -> Masks:
    """Return the decoder's mask at prefill, made from `given`, the mask that its caller made of the full prompt.

    Never None: gaps in position ids would be read as several packed sequences.
    """
    if isinstance(mask_argument, dict):
        given = {name: on_both_axes(mask, prompt) for name, mask in mask_argument.items() if mask is not None}
        if len(given) == len(mask_argument):
            return given
        causal = own_masks(prompt.order, prompt.order, prompt.short_mask.bool(), config, dtype)
        return {**cast(dict[str, Tensor], causal), **given}
    if isinstance(mask_argument, Tensor) and mask_argument.dim() == 4:
        return on_both_axes(mask_argument, prompt)
    if not _window_binds(config, prompt.mask.shape[1]):
        return prompt.short_mask
    return own_masks(prompt.order, prompt.order, prompt.short_mask.bool(), config, dtype)


def decoding_masks(
    prompt: KeptSequence, mask: Tensor, new: int, cache: Any, config: PreTrainedConfig, dtype: torch.dtype
) -> Masks:
    """Return the decoder's mask of `new` rows after a shortened prefill.

    Args:
        prompt: columns that the prefill kept.
        mask: int64 [R, full length], the caller's.
        new: number of rows that the decoder is called on.
        cache: says how many keys its sliding layers hold.
        config: config of the decoder.
        dtype: dtype of an additive mask.
    """
    valid = _valid(prompt, mask)
    if not _window_binds(config, mask.shape[1]):
        return valid
    # A sliding layer's cache holds the last rows only; they are at least those its window reaches.
    held, offset = cache.get_mask_sizes(new, sliding_layer(config))
    columns = _columns(prompt, mask)
    return own_masks(columns[:, -new:], columns, valid.bool(), config, dtype, slice(offset, offset + held))


def step_mask(
    prompt: KeptSequence, mask: Tensor, new: int, cache: Any, layer: int, config: PreTrainedConfig, dtype: torch.dtype
) -> Tensor:
    """Return one layer's mask of `new` rows after a prefill of which the layer caches the kept columns.

    Args:
        prompt: columns of the prompt that the layer has read.
        mask: int64 [R, full length], the caller's.
        new: number of rows that the decoder is called on.
        cache: says how many keys the layer holds, with those of the new rows.
        layer: number of the layer.
        config: config of the decoder.
        dtype: dtype of an additive mask.
    """
    # A sliding layer's cache holds the last rows only; they are at least those its window reaches.
    held, offset = cache.get_mask_sizes(new, layer)
    columns, valid = _columns(prompt, mask), _valid(prompt, mask)
    masks = own_masks(columns[:, -new:], columns, valid.bool(), config, dtype, slice(offset, offset + held))
    return masks[config.layer_types[layer]] if isinstance(masks, dict) else masks


def _columns(prompt: KeptSequence, mask: Tensor) -> Tensor:
    """Return the original columns of a prompt's kept rows and of all after it: int64 [R, n + m], `mask` [R, L + m]."""
    later = torch.arange(prompt.mask.shape[1], mask.shape[1], device=mask.device).expand(len(mask), -1)
    return torch.cat([prompt.order, later], 1)


def _valid(prompt: KeptSequence, mask: Tensor) -> Tensor:
    """Return the caller's mask, int64 [R, L + m], of a prompt's kept rows and of all after it: int64 [R, n + m]."""
    return torch.cat([prompt.short_mask, mask[:, prompt.mask.shape[1] :]], 1)


def _window_binds(config: PreTrainedConfig, length: int) -> bool:
    reach = window(config)
    return reach is not None and length > reach


def sliding_layer(config: PreTrainedConfig) -> int:
    types = getattr(config, "layer_types", None)
    return types.index("sliding_attention") if types else 0


def on_both_axes(mask: Tensor, prompt: KeptSequence) -> Tensor:
    """Select the kept columns as queries and as keys, [1 or R, h, L, L] -> [R, h, n, n], and hide fillers."""
    rows, kept = prompt.order.shape
    mask = mask.expand(rows, *mask.shape[1:])
    mask = mask.gather(2, prompt.order[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    mask = mask.gather(3, prompt.order[:, None, None].expand(-1, mask.shape[1], kept, -1))
    return hide(mask, ~prompt.valid[:, None, None])


def hide(mask: Tensor, hidden: Tensor) -> Tensor:
    """Return a mask, boolean or additive, under which keys where `hidden` is True are not seen either."""
    return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def own_masks(
    queries: Tensor,
    keys: Tensor,
    valid: Tensor,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    held: slice = slice(None),
) -> Masks:
    """Return causal masks by original columns, one for each type of layer if the config names types.

    Masks are additive for eager attention, else boolean: [R, 1, Q, K], or [R, 1, Q, held keys] where a layer slides.

    Args:
        queries: int64 [R, Q], original columns of the queries.
        keys: int64 [R, K], original columns of the keys.
        valid: bool [R, K], False for keys that nobody sees.
        config: config of the decoder.
        dtype: dtype of an additive mask.
        held: the keys that a sliding layer's cache holds.
    """
    reach = window(config)
    distance = queries[:, :, None] - keys[:, None]
    full = (distance >= 0) & valid[:, None]
    sliding = (full & (distance < reach))[..., held] if reach else full[..., held]
    eager = config._attn_implementation in ("eager", "catp_eager")
    full_mask, sliding_mask = (_as_attention_takes_it(mask[:, None], eager, dtype) for mask in (full, sliding))
    if getattr(config, "layer_types", None) is None:
        return sliding_mask
    return {"full_attention": full_mask, "sliding_attention": sliding_mask}


def _as_attention_takes_it(mask: Tensor, eager: bool, dtype: torch.dtype) -> Tensor:
    return (
        torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        if eager
        else mask
    )


def of_columns(values: Tensor, rows: KeptSequence) -> Tensor:
    """Select the kept columns: [..., 1 or R, L, D] -> [..., R, n, D]."""
    if len(rows.order) == 1:
        return values.index_select(-2, rows.order[0])
    values = values.expand(*values.shape[:-3], len(rows.order), *values.shape[-2:])
    return values.gather(-2, rows.order[..., None].expand(*values.shape[:-2], -1, values.shape[-1]))


def layer_mask(mask: Tensor | None, rows: KeptSequence, later: int, flash: bool) -> Tensor | None:
    """Return a layer's mask over the kept columns of a prompt and over `later` columns after it; None: causal.

    Args:
        mask: over all columns, [1 or R, h, Q, L + later], or [R, L + later] for flash attention; None: causal.
        rows: the kept columns.
        later: number of columns after the prompt, 0 at prefill.
        flash: True for flash attention.
    """
    length = rows.mask.shape[1]
    if flash:  # never None: gaps in position ids would be read as several packed sequences
        after = rows.mask.new_ones(len(rows.valid), later) if mask is None else mask[:, length:]
        return torch.cat([rows.short_mask, after], 1)
    if mask is None and rows.even:
        return None
    valid = pad(rows.valid, (0, later), value=True)
    if mask is None:  # a decoding step without a mask has one query row
        mask = torch.ones(1, 1, 1 if later else length, length + later, dtype=torch.bool, device=valid.device)
        mask = mask if later else mask.tril()
    if not later:
        return on_both_axes(mask, rows)
    mask = mask.expand(len(valid), -1, -1, -1)
    before = mask[..., :length].gather(3, rows.order[:, None, None].expand(-1, *mask.shape[1:3], -1))
    return hide(torch.cat([before, mask[..., length:]], 3), ~valid[:, None, None])


def extended(masks: Masks, mask: Tensor, config: PreTrainedConfig, dtype: torch.dtype) -> Masks:
    """Return masks that a model made of a prompt, extended over text after it, which sees all before it.

    Args:
        masks: [R, h, L, L], of the prompt; by type of layer, where types differ.
        mask: int64 [R, L + m], attention mask of the prompt and the text after it.
        config: config of the decoder.
        dtype: dtype of an additive mask.
    """
    columns = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    causal = own_masks(columns, columns, mask.bool(), config, dtype)
    if isinstance(masks, dict):
        of_type = causal if isinstance(causal, dict) else dict.fromkeys(masks, causal)
        return of_type | {name: _beginning(own, of_type[name]) for name, own in masks.items() if own is not None}
    assert isinstance(causal, Tensor)
    return _beginning(masks, causal)


def _beginning(mask: Tensor, longer: Tensor) -> Tensor:
    """Return the mask `longer`, [R, 1, N, N], with `mask`, [R, h, L, L], in place of its first L rows and columns."""
    length = mask.shape[-1]
    found = longer.repeat(1, mask.shape[1], 1, 1)
    found[..., :length, :length] = mask
    return found
