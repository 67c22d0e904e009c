"""Key-value caches of pruned prompts, sealed so that only the context that filled one can decode from it.

Only that context knows which columns are missing from the cache.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache as once
from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from catp_lightning.errors import PruningError
from catp_lightning.utils.signatures import parameters_of

SEALED = "_catp_sealed"  # attribute of a sealed layer's class: the class that it was before
WHOLE = "_catp_whole"  # attribute of caches, and of their copies, whose prompt was seen and kept whole
CACHE_NAMES = ("cache", "past_key_values")  # of arguments and outputs, from transformers 5.24 on and before


def cache_in(values: Mapping[str, Any]) -> Any:
    """Return the cache among a call's arguments or in a model's output, under either name; None if there is none.

    A caller may use the old name with newer versions too, which rename it after our hooks have seen it.
    """
    named = {name: value for name, value in values.items() if name in CACHE_NAMES}  # outputs asked for the old one warn
    return next((named[name] for name in CACHE_NAMES if name in named), None)


def cache_name(call: Callable[..., Any]) -> str:
    """Return the name of a function's argument that is a cache."""
    return next(name for name in CACHE_NAMES if name in parameters_of(call))


@dataclass
class Seal:
    """Seal of one cache, which its layers share.

    Attributes:
        missing: number of columns that were read and that no layer holds; 0 where the first layer holds all.
        open: True while the running call of the pruned model may add to the cache: layers are then what they were.
    """

    missing: int = 0
    open: bool = False


@once
def _sealed(kind: type) -> type:
    """Return the class of sealed cache layers whose own class is `kind`: an update of such a layer raises PruningError.

    A model that is not pruned, or not by the context that filled the cache, would take what is left of the prompt for
    all of it. Copies and pickles of a sealed layer are sealed too. Its attribute `rows`, int64 [R], is the row of the
    prefill that each of the R rows of the batch continues. Its lengths count the columns that are missing: code outside
    the decoder takes them for the number of columns read so far.
    """
    own: Any = kind

    class Sealed(own):
        _layer_type: str | None = None  # transformers must not take this class for the kind's
        rows: Tensor
        seal: Seal

        def update(self, *args: Any, **kwargs: Any) -> Any:
            if self.seal.open:
                return super().update(*args, **kwargs)
            if self.get_seq_length() == 0:  # the cache was emptied: this is another prompt
                _unseal(self)
                return self.update(*args, **kwargs)
            raise _elsewhere()

        def get_seq_length(self) -> int:
            held: int = super().get_seq_length()
            return held if self.seal.open or held == 0 else held + self.seal.missing

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            if self.seal.open or self.seal.missing == 0:
                sizes: tuple[int, int] = super().get_mask_sizes(query_length)
                return sizes
            return self.get_seq_length() + query_length, 0

        def crop(self, count: int) -> None:
            length = max(count - self.seal.missing, 1) if count > 0 else count  # transformers 5.13 is given a length
            _unseal(self)
            try:
                self.crop(length)
            finally:
                self.__class__ = Sealed

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

    if issubclass(kind, LinearAttentionCacheLayerMixin):
        _guard_states(Sealed)
    setattr(Sealed, SEALED, kind)
    Sealed.__name__ = Sealed.__qualname__ = kind.__name__
    return Sealed


def _guard_states(sealed: Any) -> None:
    """Make a class of sealed layers refuse to say that it has a recurrent state, which is asked before it is read."""
    name = "has_previous_state"

    def had(self: Any) -> Any:
        if not self.seal.open:
            raise _elsewhere()
        return vars(self)[name]

    def reset(self: Any) -> None:
        _unseal(self)
        self.reset()

    setattr(sealed, name, property(had, lambda self, value: vars(self).update({name: value})))
    sealed.reset = reset


def _elsewhere() -> PruningError:
    return PruningError(
        "This cache holds a pruned prompt, and can be decoded from only inside the prune context that filled "
        "it, as the last prompt there. Decode before the context is left, or read the whole text again without "
        "a cache."
    )


def _sealed_again(kind: type, state: dict[str, Any]) -> Any:
    layer: Any = object.__new__(_sealed(kind))
    vars(layer).update(state)
    return layer


def _is_sealed(layer: Any) -> bool:
    return hasattr(type(layer), SEALED)


def kind_of(layer: Any) -> type:
    """Return the class that a cache layer has when it is not sealed."""
    kind: type = getattr(type(layer), SEALED, type(layer))
    return kind


def _unseal(layer: Any) -> None:
    layer.__class__ = kind_of(layer)


def layers_of(cache: Any) -> Iterator[Any]:
    """Yield the layers of a cache; those of self-attention first in an encoder-decoder's cache."""
    own = getattr(cache, "self_attention_cache", None)
    for part in (cache,) if own is None else (own, getattr(cache, "cross_attention_cache", None)):
        yield from getattr(part, "layers", ())


def _is_filled(layer: Any) -> bool:
    """Return True if a cache layer holds rows, or a recurrent state."""
    if hasattr(layer, "get_seq_length"):
        return bool(layer.get_seq_length() > 0)
    states = getattr(layer, "is_conv_states_initialized", False)  # one to a layer in older versions
    return any(states.values()) if isinstance(states, dict) else bool(states)


def seal(cache: Any, rows: Tensor, missing: int = 0) -> None:
    """Seal a cache's filled layers.

    Args:
        cache: the cache.
        rows: int64 [R], the row of the prefill that each row of the batch continues.
        missing: number of columns that were read and that no layer holds; 0 where the first layer holds all.
    """
    own = Seal(missing)
    vars(cache).pop(WHOLE, None)
    for layer in layers_of(cache):
        if _is_filled(layer):  # a failed call may not have reached all layers
            layer.__class__ = _sealed(kind_of(layer))
            layer.rows, layer.seal = rows, own


def _first_sealed(cache: Any) -> Any:
    """Return the first sealed layer of a cache; None if it has none."""
    return next((layer for layer in layers_of(cache) if _is_sealed(layer)), None)


def rows_of(cache: Any) -> Tensor | None:
    """Return the row of the prefill that each row of a sealed cache continues, int64 [R]; None if it is not sealed."""
    layer = _first_sealed(cache)
    return None if layer is None else layer.rows


def missing_in(cache: Any) -> int:
    """Return the number of columns that were read into a cache and that no layer holds; 0 if it is not sealed."""
    layer = _first_sealed(cache)
    return 0 if layer is None else layer.seal.missing


class Opened:
    """Cache that the running call of a pruned model may add to, until the call has ended."""

    def __init__(self) -> None:
        self._seal: Seal | None = None

    def open(self, cache: Any) -> Tensor:
        """Let a sealed cache be added to. Return the row of the prefill that each of its rows continues, int64 [R].

        Raises:
            PruningError: the cache is not sealed: it was not filled by a pruned prompt.
        """
        layer = _first_sealed(cache)
        if layer is None:
            raise foreign_cache()
        self.close()  # a cache that an interrupted call left open
        self._seal = layer.seal
        self._seal.open = True
        rows: Tensor = layer.rows
        return rows

    def close(self) -> None:
        if self._seal is not None:
            self._seal.open, self._seal = False, None


def mark_whole(cache: Any) -> None:
    """Mark a cache as holding a prompt of which nothing was dropped."""
    setattr(cache, WHOLE, True)


def is_short(cache: Any) -> bool | None:
    """Return True if a cache holds a shortened prompt, False if a whole one, None if it was filled unseen."""
    if hasattr(cache, WHOLE):
        return False
    return None if _first_sealed(cache) is None else True


def foreign_cache() -> PruningError:
    """Return the error for a cache that was not filled by the last pruned prompt."""
    return PruningError(
        "This cache was not filled by the last pruned prompt, or was changed since: it cannot be decoded from. "
        "Generate from the prompt again, with all of its images and without a cache."
    )


def refuse_static(cache: Any) -> None:
    """Raise PruningError if a cache has a fixed length, or has no layers that can be sealed."""
    if cache is not None and not any(hasattr(cache, name) for name in ("layers", "self_attention_cache")):
        raise PruningError(
            f"A cache of type {type(cache).__name__} cannot be pruned: it has no layers. Leave it out, or pass a "
            "DynamicCache."
        )
    if getattr(cache, "is_compileable", False):
        raise PruningError(
            "A static cache cannot be pruned: its places and its masks are laid out for all columns before it is known "
            "which are dropped, and no memory would be saved. Leave cache_implementation at its default."
        )
