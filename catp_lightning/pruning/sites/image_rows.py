"""Image rows that a cross-attention prefill reads and stores, and that its decoding steps find in the cache."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from catp_lightning.errors import PruningError
from catp_lightning.prompt.kept import KeptSequence, kept_sequence
from catp_lightning.prompt.visibility import TextVisibility, read_unmasked


class CrossAttentionPrefill:
    """State of a running prefill of a model that reads image rows by cross-attention.

    R is B samples times the beams, T image rows, N tiles of all images, L text rows, D features.

    Attributes:
        visibility: the tiles that the call's text sees.
        states: float [R, T, D], all image rows.
        tokens: bool [R, T], True for the image rows that text sees.
        rows: image rows that the next layer reads; fillers are masked.
        changes: replaced arguments of the next layer.
        cached: image rows that caches are shortened to: decoding sees what the last text row saw.
        complete: True if `cached` is all rows and none that text sees is dropped: then the model's own masks are right.
        stored: the rows that were cached, for later decoding steps; None before the first layer has cached any.
    """

    def __init__(self, visibility: TextVisibility, states: Tensor) -> None:
        self.visibility, self.states = visibility, states
        self.tile_rows = states.shape[1] // visibility.tiles.shape[2]
        self.last = visibility.last_tiles()
        self.whole = ~self.last.any(1, keepdim=True)  # bool [R, 1]: decoding sees no tile, and attends to all rows
        self.tokens = self._rows(visibility.of_text.any(1))
        self.stored: CachedRows | None = None
        self.narrow(self.tokens)

    def _rows(self, tiles: Tensor) -> Tensor:
        return tiles.repeat_interleave(self.tile_rows, 1)

    def narrow(self, keep: Tensor) -> None:
        """Let text read only the image rows `keep`, bool [R, T], from the next layer on.

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
            "attention_mask": self.visibility.mask_of(self.rows),
        }
        self._left: list[tuple[int, Tensor]] = []  # (row of the batch, its text rows that see no kept tile)
        if self.rows.order.shape[1] < keep.shape[1]:
            nothing = ~(self.visibility.tiles & tiles[:, None]).any(2)
            self._left = [(row, nothing[row].nonzero()[:, 0]) for row in nothing.any(1).nonzero()[:, 0].tolist()]

    def repaired(self, module: Any, hidden: Tensor, output: Tensor) -> Tensor:
        """Return a layer's output [R, L, D], recomputed over all image rows for text rows that see no kept one.

        The model leaves text rows unmasked that see no image, and weighs all image rows alike where it masks them all.
        """
        output = output.clone() if self._left else output
        for row, at in self._left:
            read = read_unmasked(module, hidden[row, at], self.states[row], self.visibility.sees[row, at])
            output[row, at] = read.to(output.dtype)
        return output

    def cut_cache(self, cache: Any, layer: int, used: KeptSequence) -> None:
        """Shorten what layer `layer` has just cached from the image rows that it read, `used`, to `cached`."""
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
    """Image rows that a prefill left in its cache.

    Attributes:
        rows: the cached image rows.
        tiles: bool [R, N], the tiles that the last text row of the prefill saw.
        cache: weak reference to the cache.
    """

    rows: KeptSequence
    tiles: Tensor
    cache: weakref.ref[Any]

    def is_in(self, cache: Any, held: int) -> bool:
        """Return True if `cache`, which holds `held` image rows, is the one that holds these rows."""
        return self.cache() is cache and self.rows.order.shape[1] == held

    def changes(self, visibility: TextVisibility, at: Tensor) -> dict[str, Any]:
        """Return the replaced arguments of the cross-attention layers in a decoding step.

        Args:
            visibility: the tiles that the step's text sees.
            at: int64 [R], the row of the prefill that each row of the batch continues.

        Raises:
            PruningError: the step sees tiles that were not stored.
        """
        rows, tiles = self.rows.of_rows(at), self.tiles.index_select(0, at)[:, None]
        attends_to_all = (visibility.real & ~visibility.sees)[..., None]
        if bool((visibility.of_text & ~tiles | attends_to_all & tiles).any()):
            raise PruningError(
                "A decoding step sees other tiles than the last row of its prompt did, and those are not in the cache. "
                "Extend cross_attention_mask by its last row at every step, or generate from the whole text again."
            )
        return {"attention_mask": visibility.mask_of(rows)}


def _stored(rows: Tensor, keep: Tensor) -> KeptSequence:
    """Return the sequence of the image rows `rows`, bool [R, T], of which text reads only `keep`, bool [R, T]."""
    order = kept_sequence(rows, keep).order
    return KeptSequence(order, keep.gather(1, order), keep)
