"""Caches of pruned prompts: only the context that filled one knows what it lacks, and only it decodes from it."""

from functools import cache as once
from typing import Any

import torch
from torch import Tensor

from catp_lightning.errors import PruningError

SEALED = "_catp_sealed"  # on the class of a sealed layer: the class it had
WHOLE = "_catp_whole"  # on caches whose prompt was seen and kept whole, and on their copies


@once
def _sealed(kind: type) -> type:
    """The class of a cache's layer of some kind while nothing may be added to it; copies of the layer are sealed too.

    A model that is not pruned, or not by the context that filled the cache, would take what is left of the prompt for
    all of it. A sealed layer has `rows`, int64 [R]: of which row of the prefill each row of the batch is now.
    """
    own: Any = kind

    class Sealed(own):
        _layer_type: str | None = None  # transformers must not take this class for the kind's
        rows: Tensor

        def update(self, *args: Any, **kwargs: Any) -> Any:
            if self.get_seq_length() == 0:  # it was emptied: what comes is another prompt
                _unseal(self)
                return self.update(*args, **kwargs)
            raise PruningError(
                "This cache holds a pruned prompt, and can be decoded from only inside the prune context that filled "
                "it, as the last prompt there. Decode before the context is left, or read the whole text again without "
                "past_key_values."
            )

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self.rows = self.rows.index_select(0, beam_idx.to(self.rows.device))

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self.rows = self.rows.repeat_interleave(repeats)

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self.rows = self.rows[indices]

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _sealed_again, (kind, vars(self))

    setattr(Sealed, SEALED, kind)
    Sealed.__name__ = Sealed.__qualname__ = kind.__name__
    return Sealed


def _sealed_again(kind: type, state: dict[str, Any]) -> Any:
    layer: Any = object.__new__(_sealed(kind))
    vars(layer).update(state)
    return layer


def _is_sealed(layer: Any) -> bool:
    return hasattr(type(layer), SEALED)


def kind_of(layer: Any) -> type:
    """The class of a cache's layer as its model made it, sealed or not."""
    kind: type = getattr(type(layer), SEALED, type(layer))
    return kind


def _unseal(layer: Any) -> None:
    layer.__class__ = kind_of(layer)


def layers_of(cache: Any) -> list[Any]:
    """The layers of a cache; of an encoder-decoder's those of its self-attention first."""
    parts = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    return [layer for part in (parts if parts[0] is not None else [cache]) for layer in getattr(part, "layers", ())]


def seal(cache: Any, rows: Tensor) -> None:
    """Say of a cache that it holds a shortened prompt, whose rows int64 [R] those of the batch continue."""
    for layer in layers_of(cache):
        if layer.get_seq_length() > 0:  # a call that failed has not come to all of them
            layer.__class__ = _sealed(kind_of(layer))
            layer.rows = rows


def rows_of(cache: Any) -> Tensor | None:
    """Which rows of a prefill the rows of its cache continue, int64 [R]; None: the cache is not sealed."""
    return next((layer.rows for layer in layers_of(cache) if _is_sealed(layer)), None)


class Opened:
    """The cache that a running call of a pruned model may add to; sealed again when the call has ended."""

    def __init__(self) -> None:
        self._cache: Any = None
        self._rows = torch.zeros(0, dtype=torch.int64, device="cpu")

    def open(self, cache: Any) -> Tensor:
        """Which rows of its prefill a sealed cache's rows continue, int64 [R]. From here on it can be added to."""
        rows = rows_of(cache)
        if rows is None:
            raise foreign_cache()
        self.close()  # of a call that was interrupted
        self._cache, self._rows = cache, rows
        for layer in layers_of(cache):
            _unseal(layer)
        return rows

    def close(self) -> None:
        cache, self._cache = self._cache, None
        if cache is not None:
            seal(cache, self._rows)


def mark_whole(cache: Any) -> None:
    """Say of a cache that it holds a prompt of which nothing was dropped."""
    setattr(cache, WHOLE, True)


def is_short(cache: Any) -> bool | None:
    """Whether a cache holds a shortened prompt; None where it was filled out of sight."""
    return True if rows_of(cache) is not None else False if hasattr(cache, WHOLE) else None


def foreign_cache() -> PruningError:
    """Of a cache that another prompt than the last one filled."""
    return PruningError(
        "This cache was not filled by the last pruned prompt, or was changed since: it cannot be decoded from. "
        "Generate from the prompt again, and without assisted or prompt-lookup decoding."
    )


def refuse_static(cache: Any) -> None:
    """Raise PruningError where a cache has a fixed length, or no layers that could say what they lack."""
    if cache is not None and not any(hasattr(cache, name) for name in ("layers", "self_attention_cache")):
        raise PruningError(
            f"A cache of type {type(cache).__name__} cannot be pruned: it has no layers. Leave past_key_values out, or "
            "pass a DynamicCache."
        )
    if getattr(cache, "is_compileable", False):
        raise PruningError(
            "A static cache cannot be pruned: its length is fixed. Leave cache_implementation at its default."
        )
