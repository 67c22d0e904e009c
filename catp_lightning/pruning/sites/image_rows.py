"""Image rows that a cross-attention prefill reads and stores, and that its decoding steps find in the cache."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from catp_lightning.errors import PruningError
from catp_lightning.prompt.caches import cache_name
from catp_lightning.prompt.kept import KeptSequence, order_of
from catp_lightning.prompt.visibility import TextVisibility, keys_and_values, read_unmasked
from catp_lightning.utils.on_cpu import of_known, on_cpu, on_device


@dataclass(frozen=True)
class SharedImages:
    """Image rows of S samples that several prompts read: each module's keys and values of them are made once.

    T image rows, D features, R prompts.

    Attributes:
        states: float [S, T, D], the image rows.
        at: int64 [R], the sample whose image each prompt reads.
        found: keys and values so far, by cross-attention module.
    """

    states: Tensor
    at: Tensor
    found: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, states: Tensor) -> "SharedImages":
        """Return images that are read by one prompt each: float [S, T, D]."""
        return cls(states, torch.arange(len(states), dtype=torch.int64, device=states.device))

    def each(self, change: Callable[[Tensor], Tensor]) -> "SharedImages":
        """Return the same images, read by other prompts: `change` is applied to `at`."""
        return replace(self, at=change(self.at))

    def keys_and_values(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Return what the module makes of the images of all samples: [S, T, heads, width] each."""
        if module not in self.found:
            self.found[module] = keys_and_values(module, self.states)
        return self.found[module]


@dataclass(frozen=True)
class _TextRows:
    """Some text rows of M prompts, n of each; fewer are its own, and others fill up.

    Attributes:
        prompts: int64 [M], rows of the batch.
        rows: int64 [M, n], text rows.
        own: bool [M, n], False for those that fill up.
    """

    prompts: Tensor
    rows: Tensor
    own: Tensor

    @classmethod
    def where(cls, text: Tensor) -> "_TextRows | None":
        """Return the text rows where `text`, bool [R, L], is True; None if it is nowhere."""
        device, (text,) = text.device, on_cpu(text)
        prompts = text.any(1).nonzero()[:, 0]
        if not len(prompts):
            return None
        text = text[prompts]
        rows = (~text).long().argsort(dim=1, stable=True)[:, : int(text.sum(1).max())]
        return cls(*(on_device(part, device) for part in (prompts, rows, text.gather(1, rows))))

    def put(self, output: Tensor, values: Tensor) -> Tensor:
        """Return `output`, [R, L, D], with `values`, [M, n, D], in the places of these text rows."""
        prompts, rows, own = on_cpu(self.prompts, self.rows, self.own)
        places, at = (prompts[:, None] * output.shape[1] + rows)[own], own.flatten().nonzero()[:, 0]
        values = values.flatten(0, 1)[on_device(at, output.device)].to(output.dtype)
        return output.flatten(0, 1).index_copy(0, on_device(places, output.device), values).view_as(output)


class CrossAttentionPrefill:
    """State of a running prefill of a model that reads image rows by cross-attention.

    R is B samples times the beams, T image rows, N tiles of all images, L text rows, D features.

    Attributes:
        visibility: the tiles that the call's text sees.
        states: float [R, T, D], all image rows.
        tokens: bool [R, T], True for the image rows that text sees.
        rows: image rows that the next layer reads; fillers are masked.
        mask: float [R, 1, L, n], its mask over them.
        shared: the images whose keys and values are shared with other prompts; None: layers make them of `states`.
        cached: image rows that caches are shortened to: decoding sees what the last text row saw.
        complete: True if `cached` is all rows and none that text sees is dropped: then the model's own masks are right.
        stored: the rows that were cached, for later decoding steps; None before the first layer has cached any.
    """

    def __init__(self, visibility: TextVisibility, states: Tensor, shared: SharedImages | None = None) -> None:
        self.visibility, self.states, self.shared = visibility, states, shared
        self.tile_rows = states.shape[1] // visibility.tiles.shape[2]
        self.last = visibility.last_tiles()
        # bool [R, 1]: decoding sees no tile, and attends to all rows
        self.whole = of_known(lambda last: ~last.any(1, keepdim=True), self.last)
        self.tokens = self._rows(of_known(lambda tiles: tiles.any(1), visibility.of_text))
        self.stored: CachedRows | None = None
        self.narrow(self.tokens)

    def _rows(self, tiles: Tensor) -> Tensor:
        return of_known(lambda part: part.repeat_interleave(self.tile_rows, 1), tiles)

    def narrow(self, keep: Tensor) -> None:
        """Let text read only the image rows `keep`, bool [R, T], from the next layer on.

        Raises:
            PruningError: a sample keeps nothing of what its last text row sees.
        """
        device, (keep, last, whole, tokens) = keep.device, on_cpu(keep, self.last, self.whole, self.tokens)
        tiles = keep.unflatten(1, (-1, self.tile_rows)).any(2)
        if not bool(((last & tiles).any(1, keepdim=True) | whole).all()):
            raise PruningError(
                "Nothing was kept of the image that the end of a prompt reads, so its answer could see nothing. "
                'Keep at least one row of every image: a budget per="image" does.'
            )
        lasting = self._rows(last) | whole
        self.rows = self.cached = _stored(keep | whole, keep, device)
        if bool((keep & ~lasting).any()):
            self.cached = _stored(keep & lasting | whole, keep & lasting, device)
        self.complete = self.cached.order.shape[1] == keep.shape[1] and not bool((tokens & ~keep).any())
        self.mask = self.visibility.mask_of(self.rows)
        self._gathered = self.rows.gather(self.states) if self.shared is None else None
        self._left: _TextRows | None = None  # text rows that see no kept tile
        if self.rows.order.shape[1] < keep.shape[1]:
            (seen,) = on_cpu(self.visibility.tiles)
            self._left = _TextRows.where(on_device(~(seen & tiles[:, None]).any(2), device))

    def changes(self, module: Any) -> dict[str, Any]:
        """Return the replaced arguments of a layer: it reads the image rows `rows`, of `states` or from a cache."""
        if self.shared is None:
            return {"cross_attention_states": self._gathered, "attention_mask": self.mask}
        keys, values = self.shared.keys_and_values(module)
        kept, cache = (self.shared.at[:, None], self.rows.order), DynamicCache()
        cache.update(keys[kept].transpose(1, 2), values[kept].transpose(1, 2), module.layer_idx)
        if cache.get_seq_length() == 0:  # transformers 5.13 asks the first layer whether there is anything
            cache.update(keys[:1, :1], values[:1, :1], 0)
        return {"cross_attention_states": None, cache_name(module.forward): cache, "attention_mask": self.mask}

    def repaired(self, module: Any, hidden: Tensor, output: Tensor) -> Tensor:
        """Return a layer's output [R, L, D], recomputed over all image rows for text rows that see no kept one.

        The model leaves text rows unmasked that see no image, and weighs all image rows alike where it masks them all.
        """
        left = self._left
        if left is None:
            return output
        if self.shared is None:
            images = keys_and_values(module, self.states[left.prompts])
        else:
            keys, values = self.shared.keys_and_values(module)
            images = keys[self.shared.at[left.prompts]], values[self.shared.at[left.prompts]]
        at = left.prompts[:, None].expand_as(left.rows), left.rows
        read = read_unmasked(module, hidden[at], images, self.visibility.sees[at])
        return left.put(output, read)

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

    def changes(self, visibility: TextVisibility, at: Tensor, check: bool) -> dict[str, Any]:
        """Return the replaced arguments of the cross-attention layers in a decoding step.

        Args:
            visibility: the tiles that the step's text sees.
            at: int64 [R], the row of the prefill that each row of the batch continues.
            check: False if it is known that the step sees what the last row of its prompt did.

        Raises:
            PruningError: the step sees tiles that were not stored.
        """
        rows = self.rows.of_rows(at)
        if not check:
            return {"attention_mask": visibility.mask_of(rows)}
        tiles, attends_to_all = self.tiles.index_select(0, at)[:, None], (visibility.real & ~visibility.sees)[..., None]
        if bool((visibility.of_text & ~tiles | attends_to_all & tiles).any()):
            raise PruningError(
                "A decoding step sees other tiles than the last row of its prompt did, and those are not in the cache. "
                "Extend cross_attention_mask by its last row at every step, or generate from the whole text again."
            )
        return {"attention_mask": visibility.mask_of(rows)}


def _stored(rows: Tensor, keep: Tensor, device: torch.device) -> KeptSequence:
    """Return the sequence of the image rows `rows`, bool [R, T], of which text reads only `keep`; both on the CPU."""
    order = order_of(rows)
    valid = keep.gather(1, order)
    return KeptSequence(on_device(order, device), on_device(valid, device), on_device(keep, device))
