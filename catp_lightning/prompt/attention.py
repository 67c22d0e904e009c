"""Observed attention: the numbers a score needs, while the model's own implementation computes the output.

transformers lets anybody register an attention function by name (`AttentionInterface`). The one registered here looks
at queries and keys of the modules that are being observed, hands a reduction of their attention to an observer, and
passes everything on to the implementation the model had: eager, sdpa or flash. Nothing is patched, and
`output_attentions` stays off.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from catp_lightning.errors import PruningError
from catp_lightning.utils.hooks import not_copied, untraced
from catp_lightning.utils.parts import all_parts

Reduction = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
"""Function (query [B, H, Q, D], key [B, H, N, D], mask or None, scaling) -> whatever is kept of the attention."""

OBSERVER = "_catp_observer"  # lives on a module only while it is observed
PREFIX = "catp_"
ROWS = 1024
SUPPORTED = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")


def attention_map(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, cap: float | None = None) -> Tensor:
    """Return the whole attention map, [B, H, Q, N], in float32 at least.

    It is meant for few queries, as in cross-attention of query tokens. Arguments are those of a `Reduction`, and the
    bound `cap` within which Gemma 2 keeps its logits; None: there is none.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):  # else it rounds to half precision, and ties decide
        logits = query.to(dtype) @ key.to(dtype).transpose(-1, -2) * scaling
    if cap is not None:
        logits = (logits / cap).tanh() * cap
    if mask is not None and mask.dim() == 2:  # the mask of flash attention: which keys are real
        mask = mask[:, None, None].bool()
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1)


def attention_received(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, counted: Tensor | None = None
) -> Tensor:
    """Return the attention that each key receives, summed over query rows: [B, H, N].

    One head and at most `ROWS` of its query rows are computed at a time, so [B, H, Q, N] is never held. Arguments are
    those of a `Reduction`, but keys may have fewer heads, each for a group of the queries' heads.

    Args:
        counted: bool [B, 1, Q, N], the pairs of row and key that are summed; None: all.
    """
    found, group = [], query.shape[1] // key.shape[1]
    for head in range(query.shape[1]):
        keys = key[:, head // group][:, None]
        own = mask if mask is None or mask.dim() == 2 else mask[:, head % mask.shape[1]][:, None]
        paid = []
        for start in range(0, query.shape[2], ROWS):
            rows = slice(start, start + ROWS)
            some = own if own is None or own.dim() == 2 or own.shape[2] == 1 else own[:, :, rows]
            part = attention_map(query[:, head : head + 1, rows], keys, some, scaling)
            paid.append((part if counted is None else part.masked_fill(~counted[:, :, rows], 0)).sum(2))
        found.append(sum(paid[1:], paid[0]))
    return torch.cat(found, 1)


@contextmanager
def observe_attention(
    model: PreTrainedModel, modules: Mapping[nn.Module, tuple[Reduction, Callable[[Tensor], None]]]
) -> Iterator[None]:
    """Hand `reduction(query, key, mask, scaling)` of each of `modules` to its observer while inside.

    It is called once a forward, and in vision towers that read pictures one after the other once for each of them.

    Args:
        model: the (sub-)model the attention modules belong to; its `config` says which implementation they use.
        modules: attention modules, each with a reduction and the observer that receives its result.

    Raises:
        PruningError: the model uses an attention implementation that cannot be observed, flex attention for example.
    """
    if not modules:
        yield
        return
    with ExitStack() as undo:
        undo.enter_context(_twin(model))
        for part in all_parts(model):  # parts whose config now names our implementation
            config = vars(part).get("config")
            if config is not None and str(getattr(config, "_attn_implementation", "")).startswith(PREFIX):
                undo.enter_context(not_copied(part))
        for module, observed in modules.items():
            undo.callback(_restore, module, module.__dict__.get(OBSERVER))
            module.__dict__[OBSERVER] = observed
        yield


@contextmanager
def _twin(model: PreTrainedModel) -> Iterator[None]:
    """Let a model attend by the observing twin of its implementation while inside.

    The implementation is named in the model's config, which models made from one config share: the last context to be
    left, in whichever thread, puts back what was there before the first. A replay that runs inside a recording is one
    of these contexts too.
    """
    config: Any = model.config
    own, mine = (config._attn_implementation or "eager").removeprefix(PREFIX), object()
    name = _registered(own)
    try:  # from here on: an interrupt may come at any line
        with _LOCK:
            _SWITCHED.setdefault(id(config), (own, set()))[1].add(mine)
            model.set_attn_implementation(name)
        yield
    finally:
        with _LOCK:
            before, inside = _SWITCHED.get(id(config), (own, set()))
            inside.discard(mine)
            if not inside:
                _SWITCHED.pop(id(config), None)
                model.set_attn_implementation(before)


_LOCK = threading.RLock()  # reentrant: garbage collection may leave an abandoned context while one is being entered
_SWITCHED: dict[int, tuple[str, set[object]]] = {}
"""Configs of observed models, by id: the config's own implementation, and one object for each context."""


def _restore(module: nn.Module, before: Any) -> None:
    if before is None:
        module.__dict__.pop(OBSERVER, None)
    else:
        module.__dict__[OBSERVER] = before


def _registered(original: str) -> str:
    """Return the name of the observing twin of an implementation, registered on first use.

    Raises:
        PruningError: attention cannot be observed under this implementation.
    """
    if original not in SUPPORTED:
        raise PruningError(
            f"Attention cannot be observed under attn_implementation={original!r}. Load the model with one of "
            f"{', '.join(SUPPORTED)}, or choose a policy whose scorer needs no attention (l2-norm, position, random)."
        )
    name = PREFIX + original
    if name not in ALL_ATTENTION_FUNCTIONS:
        # Masks first: another thread that finds the attention's name must find the mask's too.
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
        AttentionInterface.register(name, untraced(_observing(original)))
    return name


def _observing(original: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if (observed := module.__dict__.get(OBSERVER)) is not None:
            reduction, observer = observed
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            for own_query, own_key, mask in _apart(module, query.detach(), key.detach(), attention_mask, kwargs):
                observer(reduction(own_query, own_key, mask, scaling))
        own = ALL_ATTENTION_FUNCTIONS.get_interface(original, _eager_of(type(module)))
        return own(module, query, key, value, attention_mask, **kwargs)

    return attention


def _apart(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: Mapping[str, Any]
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield query, key and mask of each picture that a vision tower reads, or once if they are not told apart.

    Flash attention is called once for all pictures that lie in one row, with the places where each begins and the last
    one ends. Pixtral's tower in older versions gives positions alone, of which the first of a picture is 0. A decoder
    that is not causal, PaliGemma's, gives positions too; in a decoding step none of them is 0.
    """
    starts, positions = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    if getattr(module, "is_causal", True):
        starts = positions = None
    if starts is None and mask is None and positions is not None and positions.shape == (1, query.shape[2]):
        begins = (positions[0] == 0).nonzero()[:, 0]
        starts = nn.functional.pad(begins, (0, 1), value=query.shape[2]) if len(begins) else None
    if starts is None:
        yield query, key, mask
        return
    lengths = starts.diff().tolist()
    yield from ((*pair, None) for pair in zip(query.split(lengths, 2), key.split(lengths, 2), strict=True))


def _eager_of(kind: type) -> Any:
    """Return the eager function of an attention class.

    Each modeling file has one of its own, and the output must stay that function's. The class may be derived from that
    file's: FSDP2 gives every module it shards a class of its own.
    """
    files = (sys.modules.get(cls.__module__) for cls in kind.__mro__)
    return next(filter(None, (getattr(file, "eager_attention_forward", None) for file in files)), None)
