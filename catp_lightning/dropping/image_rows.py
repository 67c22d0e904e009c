"""Which image rows a prefill reads and stores, and what decoding finds of them."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from catp_lightning.dropping.prompt import KeptSequence, kept_sequence
from catp_lightning.errors import PruningError
from catp_lightning.families.mllama import TextVisibility, read_unmasked


class CrossAttentionPrefill:
    """A prefill that is running. R is B times the beams, N the tiles of all images.

    Attributes:
        sight: what its text sees.
        states: float [R, T, D], all image rows.
        tokens: bool [R, T], the rows that text sees.
        rows: those that the next layer reads; fillers are masked.
        changes: arguments of the next layer.
        cached: those that caches are shortened to: decoding sees what the last text row saw.
        complete: whether those are all rows, of which none that text sees is dropped: the model's own masks are right.
        stored: what was cached, for later decoding steps.
    """

    def __init__(self, sight: TextVisibility, states: Tensor) -> None:
        self.sight, self.states = sight, states
        self.tile_rows = states.shape[1] // sight.tiles.shape[2]
        self.last = sight.last_tiles()
        self.whole = ~self.last.any(1, keepdim=True)  # bool [R, 1]: decoding will attend to all rows, seen or not
        self.tokens = self._rows(sight.of_text.any(1))
        self.stored: CachedRows | None = None
        self.narrow(self.tokens)

    def _rows(self, tiles: Tensor) -> Tensor:
        return tiles.repeat_interleave(self.tile_rows, 1)

    def narrow(self, keep: Tensor) -> None:
        """From the next layer on, text reads only the rows `keep`, bool [R, T].

        Raises:
            PruningError: a sample keeps nothing of what its last text row sees.
        """
        tiles = keep.unflatten(1, (-1, self.tile_rows)).any(2)
        if not bool(((self.last & tiles).any(1, keepdim=True) | self.whole).all()):
            raise PruningError(
                "Nothing was kept of the image that the end of a prompt reads, so its answer could see nothing. "
                'Keep at least one row of every image: a budget per="image" does.'
            )
        lasting = self._rows(self.last) | self.whole
        self.rows = self.cached = _stored(keep | self.whole, keep)
        if bool((keep & ~lasting).any()):
            self.cached = _stored(keep & lasting | self.whole, keep & lasting)
        self.complete = self.cached.order.shape[1] == keep.shape[1] and not bool((self.tokens & ~keep).any())
        self.changes = {
            "cross_attention_states": self.rows.gather(self.states),
            "attention_mask": self.sight.mask_of(self.rows),
        }
        self._left: list[tuple[int, Tensor]] = []  # by row of the batch: text rows that see nothing of what is kept
        if self.rows.order.shape[1] < keep.shape[1]:
            nothing = ~(self.sight.tiles & tiles[:, None]).any(2)
            self._left = [(row, nothing[row].nonzero()[:, 0]) for row in nothing.any(1).nonzero()[:, 0].tolist()]

    def repaired(self, module: Any, hidden: Tensor, output: Tensor) -> Tensor:
        """Output [R, L, D] of a layer, as it is over all rows for text rows that see nothing of what is kept.

        The model leaves those unmasked that see no image, and weighs all rows alike where it masks them all.
        """
        output = output.clone() if self._left else output
        for row, at in self._left:
            read = read_unmasked(module, hidden[row, at], self.states[row], self.sight.sees[row, at])
            output[row, at] = read.to(output.dtype)
        return output

    def cut_cache(self, cache: Any, layer: int, used: KeptSequence) -> None:
        """Shorten what a layer that read `used` has just cached."""
        self.stored = CachedRows(self.cached, self.last, weakref.ref(cache))
        if self.cached is used:
            return
        at = torch.arange(used.order.shape[1], device=used.order.device).expand_as(used.order)
        places = torch.zeros_like(self.tokens, dtype=torch.long).scatter(1, used.order, at)
        index, entry = places.gather(1, self.cached.order)[:, None, :, None], cache.layers[layer]
        for name in ("keys", "values"):
            full = getattr(entry, name)
            setattr(entry, name, full.gather(2, index.expand(-1, full.shape[1], -1, full.shape[3])))


@dataclass(frozen=True)
class CachedRows:
    """What a prefill left in its cache: `rows`, of the tiles bool [R, N] that its last text row saw."""

    rows: KeptSequence
    tiles: Tensor
    cache: weakref.ref[Any]

    def is_in(self, cache: Any, held: int) -> bool:
        """Whether a cache of `held` image rows holds this."""
        return self.cache() is cache and self.rows.order.shape[1] == held

    def changes(self, sight: TextVisibility, at: Tensor) -> dict[str, Any]:
        """Arguments of a decoding step's layers, for a batch of these rows of the prefill: int64 [R].

        Raises:
            PruningError: it sees what was not stored.
        """
        rows, tiles = self.rows.of_rows(at), self.tiles.index_select(0, at)[:, None]
        attends_to_all = (sight.real & ~sight.sees)[..., None]
        if bool((sight.of_text & ~tiles | attends_to_all & tiles).any()):
            raise PruningError(
                "A decoding step sees other tiles than the last row of its prompt did, and those are not in the cache. "
                "Extend cross_attention_mask by its last row at every step, or generate from the whole text again."
            )
        return {"attention_mask": sight.mask_of(rows)}


def _stored(rows: Tensor, keep: Tensor) -> KeptSequence:
    """Of the rows that are stored, bool [R, T], text reads those that are kept."""
    order = kept_sequence(rows, keep).order
    return KeptSequence(order, keep.gather(1, order), keep)
