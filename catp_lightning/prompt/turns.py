"""A call that reads more of a prompt on a cache that holds what was kept of the columns before."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig

from catp_lightning.prompt.kept import KeptSequence
from catp_lightning.prompt.masks import Masks, decoding_masks, hide, sliding_layer
from catp_lightning.utils.on_cpu import on_device


@dataclass(frozen=True)
class Turn:
    """Columns that a call adds to a cache; R rows, P earlier columns, L columns of the call.

    Attributes:
        before: columns that the cache holds, p of P.
        own: columns of the call that stay, n of L.
        kept: both together: p + n of P + L.
    """

    before: KeptSequence
    own: KeptSequence
    kept: KeptSequence

    @classmethod
    def of(cls, before: KeptSequence | None, mask: Tensor, own: KeptSequence) -> "Turn":
        """Return the turn of a call.

        Args:
            before: what the cache holds of the prompt that filled it, and all columns after that prompt; None: the
                cache holds all earlier columns.
            mask: int64 [R, P + L], the caller's mask of all columns.
            own: columns of the call that stay.
        """
        past = mask.shape[1] - own.mask.shape[1]
        before = all_of(mask[:, :past]) if before is None else before.then(all_of(mask[:, before.mask.shape[1] : past]))
        return cls(before, own, before.then(own))

    def positions(self, positions: Tensor, compact: bool) -> Tensor:
        """Select position ids of the call's columns, [..., R, L] -> [..., R, n]; `compact` closes all gaps."""
        short = self.own.gather_positions(positions, compact)
        return short - self.before.dropped[:, None] * self.own.short_mask if compact else short

    def masks(self, given: Any, cache: Any, config: PreTrainedConfig, dtype: torch.dtype) -> Masks:
        """Return the decoder's mask of the call.

        Args:
            given: the mask that its caller made of all columns.
            cache: the opened cache.
            config: config of the decoder.
            dtype: dtype of an additive mask.
        """
        new = self.own.order.shape[1]
        if isinstance(given, dict):
            held, offset = cache.get_mask_sizes(new, sliding_layer(config))
            full = {name: self._on_both_axes(mask) for name, mask in given.items() if mask is not None}
            return {
                name: mask[..., offset : offset + held] if name == "sliding_attention" else mask
                for name, mask in full.items()
            }
        if isinstance(given, Tensor) and given.dim() == 4:
            return self._on_both_axes(given)
        return decoding_masks(self.kept, self.kept.mask, new, cache, config, dtype)

    def _on_both_axes(self, mask: Tensor) -> Tensor:
        """Select the call's kept columns as queries, all kept ones as keys: [1 or R, h, L, K] -> [R, h, n, p + n]."""
        queries, keys = self.own.order, self.kept.order
        if (beyond := self.kept.mask.shape[1] - mask.shape[3]) > 0:  # columns that a sliding layer's cache has let go
            mask = pad(mask, (beyond, 0), value=False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)
        mask = mask.expand(len(keys), *mask.shape[1:])
        mask = mask.gather(2, queries[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        mask = mask.gather(3, keys[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
        return hide(mask, ~self.kept.valid[:, None, None])

    def scatter(self, short: Tensor) -> Tensor:
        """Put states [R, n, D] or attention maps [R, H, n, p + n] back in their places over all columns."""
        if short.dim() == 3:
            return self.own.scatter(short)
        return self.own.scatter_keys(self.kept.scatter_keys(short).transpose(2, 3)).transpose(2, 3)


def all_of(mask: Tensor) -> KeptSequence:
    """Return a sequence of which all columns stay, under the mask int64 [R, L]."""
    order = torch.arange(mask.shape[1], dtype=torch.int64, device="cpu").expand(mask.shape)
    valid = torch.ones(mask.shape, dtype=torch.bool, device="cpu")
    return KeptSequence(on_device(order, mask.device), on_device(valid, mask.device), mask, even=True)
