"""Rows of a prompt that stay, and the way back: outputs over all columns of the full prompt."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from catp_lightning.errors import PruningError
from catp_lightning.utils.on_cpu import of_known, on_cpu, on_device
from catp_lightning.utils.rows import put_rows, take_rows


@dataclass
class KeptSequence:
    """Columns of a prompt that stay after dropping; R rows, L original columns, n kept columns of the longest row.

    Attributes:
        order: int64 [R, n], original columns of the kept rows, ascending; rows that keep fewer have fillers among them,
            or before them.
        valid: bool [R, n], False for fillers.
        mask: int64 [R, L], the caller's mask of the full prompt.
        cache: weak reference to the cache that this prefill filled, if any.
        even: True if no row has fillers; False if one may have some; None: `valid` is asked.
    """

    order: Tensor
    valid: Tensor
    mask: Tensor
    cache: weakref.ref[Any] | None = None
    even: bool | None = None

    def __post_init__(self) -> None:
        self.even = bool(on_cpu(self.valid)[0].all()) if self.even is None else self.even
        self._last: tuple[Tensor, KeptSequence] | None = None  # the last rows that were asked for, and theirs

    def gather(self, full: Tensor) -> Tensor:
        """Select the kept columns: [R, L, ...] -> [R, n, ...]."""
        return take_rows(full, self.order)

    def gather_positions(self, positions: Tensor, compact: bool) -> Tensor:
        """Select position ids [..., R, L] -> [..., R, n]; `compact` closes the gaps that dropped columns leave."""
        short = positions.gather(-1, self.order.expand(*positions.shape[:-1], -1))
        if not compact:
            return short
        dropped_before = self.mask.cumsum(1).gather(1, self.order) - self.short_mask.cumsum(1)
        return (short - dropped_before).where(self.short_mask.bool(), short)  # padding keeps what it had

    def scatter(self, short: Tensor) -> Tensor:
        """Put values of kept columns back in their places: [R, n, D] -> [R, L, D], zeros where a row was dropped."""
        own = short.masked_fill(~self.valid[..., None], 0)  # a filler's may be NaN
        return put_rows(own, self.order, self.mask.shape[1])

    def scatter_keys(self, short: Tensor, later: int | None = None) -> Tensor:
        """Put attention to kept columns back in its places over all columns: [R, H, q, n + m] -> [R, H, q, L + m].

        Args:
            short: attention to the kept columns, and to `m` keys that come after the prompt and stay as they are.
            later: m, if it is known.

        Raises:
            PruningError: the attention lacks keys, as with the cache of a sliding layer.
        """
        kept = self.order.shape[1]
        if short.shape[3] < kept + (later or 0):
            raise PruningError(
                "Attention of a layer with a sliding window cannot be put back where columns were dropped. Leave "
                "output_attentions out, or ask for it without a cache."
            )
        prompt = short[..., :kept].transpose(1, 3).flatten(2)
        prompt = self.scatter(prompt).unflatten(2, (short.shape[2], short.shape[1])).transpose(1, 3)
        return torch.cat([prompt, short[..., kept:]], 3)

    def scatter_attention(self, short: Tensor) -> Tensor:
        """Put attention among kept columns back in its places: [R, H, n, n] -> [R, H, L, L].

        It is zero where the query or the key was dropped.
        """
        return self.scatter_keys(self.scatter_keys(short).transpose(2, 3)).transpose(2, 3)

    def scatter_states(self, short: Tensor) -> Tensor:
        """Put states [R, n, D] or attention maps [R, H, n, n] of a prefill back in their places over all columns."""
        return self.scatter(short) if short.dim() == 3 else self.scatter_attention(short)

    def scatter_step(self, short: Tensor, later: int) -> Tensor:
        """Put attention maps of a decoding step back in their places over all columns; leave its states as they are.

        A decoding step's own rows are all there: [R, q, D] of states, [R, H, q, n + m] of attention, m = `later`.
        """
        return short if short.dim() == 3 else self.scatter_keys(short, later)

    @cached_property
    def short_mask(self) -> Tensor:
        """The mask of the kept rows, 0 for fillers: int64 [R, n]."""
        return of_known(lambda order, valid, mask: mask.gather(1, order) * valid, self.order, self.valid, self.mask)

    @cached_property
    def dropped(self) -> Tensor:
        """Number of columns that each row lost, without padding: int64 [R]."""
        return self.mask.sum(1) - self.short_mask.sum(1)

    @property
    def whole(self) -> bool:
        """True if nothing was dropped."""
        return self.order.shape[1] == self.mask.shape[1] and bool(self.even)

    def then(self, later: "KeptSequence") -> "KeptSequence":
        """Return the kept columns of this prompt and of the columns that follow it."""
        order = torch.cat([self.order, later.order + self.mask.shape[1]], 1)
        valid, mask = torch.cat([self.valid, later.valid], 1), torch.cat([self.mask, later.mask], 1)
        return KeptSequence(order, valid, mask, even=self.even and later.even)

    def cut(self, length: int) -> "KeptSequence | None":
        """Return what is left of the first `length` columns; None if columns after them were dropped from any row."""
        count = self.mask.shape[1] - length
        if count <= 0:
            return self
        last = torch.arange(length, self.mask.shape[1], dtype=torch.int64, device=self.order.device)
        if not torch.equal(self.order[:, -count:], last.expand(len(self.order), -1)):
            return None
        order, valid, mask = self.order[:, :-count], self.valid[:, :-count], self.mask[:, :length]
        return KeptSequence(order, valid, mask, self.cache, self.even)

    def of_rows(self, rows: Tensor) -> "KeptSequence":
        """Return the kept columns of the rows `rows`, int64 [R']: of beams, or of copies made after the prefill."""
        if self._last is None or self._last[0] is not rows:  # steps ask for the same ones unless beams trade places
            order, valid, mask = (part.index_select(0, rows) for part in (self.order, self.valid, self.mask))
            self._last = rows, KeptSequence(order, valid, mask, self.cache, self.even)
        return self._last[1]


def kept_sequence(keep: Tensor, mask: Tensor, fillers_first: bool = False) -> KeptSequence:
    """Return what is left of a prompt.

    Args:
        keep: bool [R, L], the columns that stay.
        mask: int64 [R, L], the attention mask.
        fillers_first: True to put fillers before the kept columns, like padding on the left. Layers with a recurrent
            state read rows in turn: between kept rows even a masked one would move them apart.
    """
    (own,) = on_cpu(keep)
    order = order_of(own)
    if fillers_first:
        order = order.gather(1, own.gather(1, order).long().argsort(dim=1, stable=True))
    return KeptSequence(on_device(order, keep.device), on_device(own.gather(1, order), keep.device), mask)


def order_of(keep: Tensor) -> Tensor:
    """Return the columns that stay, ascending, with fillers: bool [R, L] on the CPU -> int64 [R, n] there."""
    most = int(keep.sum(1).max())
    return (~keep).long().argsort(dim=1, stable=True)[:, :most].sort(1).values


def of_each(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to the tensors of a model's output, or of a part of it; caches stay as they are."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple):
        return tuple(of_each(value, change) for value in output)
    if isinstance(output, ModelOutput):
        for name, value in output.items():
            if (changed := of_each(value, change)) is not value:
                output[name] = changed
    return output
