"""Rows leave inside the decoder: at the entry of one of its layers, or of several in turn.

Layers before the first stage read and cache the full prompt, so lengths and positions that outer code takes from the
first layer's cache stay right. From each stage on, layers get the mask and the positions of what is left, and cache no
more. The decoder's output is handed back at full length.
"""

import inspect
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from catp_lightning.attention import SUPPORTED, attention_map, observe_attention
from catp_lightning.dropping.labels import Labels
from catp_lightning.dropping.masks import hide, on_both_axes, window
from catp_lightning.dropping.prompt import DecoderPrompt, Shortened, refuse_static, shortened, visual_tokens
from catp_lightning.dropping.prompts import Prompts
from catp_lightning.dropping.watching import Watching, replaced
from catp_lightning.errors import PruningError
from catp_lightning.families.base import Family
from catp_lightning.observation import Observation, Signal, Values


@dataclass(frozen=True)
class StagePrompt(DecoderPrompt):
    """A prompt at the entry of one of the decoder's layers. All but `tokens` is as it entered the decoder.

    Attributes:
        tokens: bool [B, T], the visual tokens that are still there; T counts those of the full prompt.
        stage: number of the stage, 0 for the first.
        attention: float32 or float64 [B, H, T], what the prompt's last real row that is still there pays each visual
            token in the layer before; 0 where there is none. With labels it is the last row before the first label
            (the first row, if none is before it); what `generate` has generated does not count. None where it was not
            asked for.
    """

    stage: int
    attention: Tensor | None

    def observation(self) -> Observation:
        """What scorers see: the tokens that are still there, as one image a sample."""
        values: Values = {} if self.attention is None else {(Signal.LAST_ROW, 0): self.attention}
        return Observation(self.tokens, {Signal.LAST_ROW: 1}, values)


class Prefill:
    """A prefill that is running; R is B times the beams.

    Attributes:
        prompt: as it entered the decoder.
        asks: bool [B, L], rows of which the last one's attention counts.
        tokens: bool [B, T], the visual tokens that are still there.
        rows: what is left of the prompt.
        kept: the same after each stage so far.
        attention: as `StagePrompt`'s.
    """

    def __init__(self, prompt: DecoderPrompt, asks: Tensor) -> None:
        self.prompt, self.asks, self.tokens = prompt, asks, prompt.tokens
        self.rows = shortened(torch.ones_like(prompt.mask, dtype=torch.bool), prompt.mask)
        self.kept: list[Shortened] = []
        self.attention: Tensor | None = None

    def at(self, stage: int) -> StagePrompt:
        return StagePrompt(**{**vars(self.prompt), "tokens": self.tokens}, stage=stage, attention=self.attention)

    def narrow(self, keep: Tensor) -> Shortened:
        """Of the visual tokens only `keep`, bool [B, T], stay. Returns what stays of the rows there were before."""
        self.tokens, before = keep & self.tokens, self.rows
        stays = shortened(self.prompt.columns(self.tokens).gather(1, before.order), before.short_mask)
        self.rows = Shortened(before.order.gather(1, stays.order), stays.valid, before.mask)
        self.kept.append(self.rows)
        return stays

    def last_row(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """What one row of each sample pays the visual tokens, [B, H, T]: an `attention.Reduction` over R rows."""
        beams, rows = self.prompt.beams, self.rows
        order, real = rows.order[::beams], rows.short_mask[::beams]
        asks = self.asks.gather(1, order) & rows.valid[::beams]
        last = asks.shape[1] - 1 - asks.flip(1).long().argmax(1)
        at = last.where(asks.any(1), real.argmax(1))
        each = torch.arange(len(at), device=at.device)
        if mask is not None and mask.dim() == 4:
            seen = mask.expand(len(query), -1, -1, -1)[::beams][each, :, at][:, :, None]
        else:  # flash attention's, or none
            causal = torch.arange(order.shape[1], device=at.device) <= at[:, None]
            seen = (causal if mask is None else causal & mask[::beams].bool())[:, None, None]
        row = query[::beams][each, :, at].unflatten(1, (key.shape[1], -1))  # heads that share a key are its queries
        paid = attention_map(row, key[::beams], seen, scaling).flatten(1, 2)
        columns = paid.new_zeros(*paid.shape[:2], self.asks.shape[1]).scatter(2, order[:, None].expand_as(paid), paid)
        found = paid.new_zeros(*self.tokens.shape, paid.shape[1])
        found[visual_tokens(self.prompt.visual)] = columns.transpose(1, 2)[self.prompt.visual]
        return found.transpose(1, 2)


class DecoderStages:
    """Drops rows at the entry of some of a decoder's layers.

    Where a row is gone hidden states are zero; attention maps and caches stay as short as they were computed.

    Args:
        family: knows the model's parts.
        choose: from a prompt, which of its `tokens` stay, bool [B, T]; called at each stage of each prefill.
        compact: must be False, the layers before the first stage have used the position ids.
        forget: called when a prompt is refused: what was observed for it must not serve another.
        stages: layers at whose entry rows leave, ascending, each at least 1 and less than the number of layers.
        observe: whether prompts have `attention`.

    Attributes:
        active: False: the model runs unpruned.

    Raises:
        PruningError: `stages` are other numbers, `compact` is True, or the decoder's attention does not allow it.
    """

    def __init__(
        self,
        family: Family,
        choose: Callable[[StagePrompt], Tensor],
        compact: bool,
        forget: Callable[[], None],
        stages: tuple[int, ...],
        observe: bool = False,
    ) -> None:
        self.family, self.choose, self.forget = family, choose, forget
        self.stages, self.observe, self.active = stages, observe, True
        self.layers: list[Any] = list(family.decoder.get_submodule("layers").children())
        self.parameters = list(inspect.signature(family.decoder.forward).parameters)
        self._refuse(compact)
        self._prompts, self._labels = Prompts(family), Labels(family.model)
        self._watching = Watching(family.model, family.model)
        self._length: int | None = None  # of the prompt of the `generate` that is running; 0 before its prefill
        self._kept: list[Shortened] = []  # by the prefill that decoding steps belong to; none: nothing was dropped
        self._cache: weakref.ref[Any] | None = None  # that it filled
        self._reset()

    def _reset(self) -> None:
        self._prefill: Prefill | None = None  # that is running
        self._later = 0  # columns after the prompt, while a decoding step is running
        self._changes: dict[str, Any] = {}  # arguments of the layers of the stage that is running

    def _refuse(self, compact: bool) -> None:
        name, depth, config = type(self.family.decoder).__name__, len(self.layers), self.family.decoder_config
        if not self.stages or list(self.stages) != sorted({*self.stages} & {*range(1, depth)}):
            raise PruningError(
                f"Tokens cannot leave at the layers {list(self.stages)} of {name}, which has {depth}: give ascending "
                f"numbers from 1 to {depth - 1}."
            )
        if compact:
            raise PruningError(
                f'positions="compact" is not possible where tokens leave at layer {self.stages[0]}: the layers before '
                'it have used their position ids. Use positions="original".'
            )
        types = {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
        if types or window(config) is not None:
            raise PruningError(
                f"{name} has layers of type {', '.join(sorted(types)) or 'sliding_attention'}: which columns their "
                "caches hold cannot be told where layers cache different numbers of rows. Choose a scorer that drops "
                "tokens before the decoder, or a checkpoint without such layers."
            )
        if config._attn_implementation not in SUPPORTED:
            raise PruningError(
                f"{name} has attn_implementation={config._attn_implementation!r}, whose masks cannot be shortened. "
                f"Load the model with one of {', '.join(SUPPORTED)}."
            )

    @property
    def labels_left_out(self) -> int:
        """How many labels of the last call were predicted from rows that were gone after the last stage."""
        return self._labels.left_out

    @contextmanager
    def dropping(self) -> Iterator[None]:
        """Hooks are in place only while inside."""
        decoder: Any = self.family.decoder
        observed = {self.layers[at - 1].self_attn: (self._last_row, self._see) for at in self.stages if self.observe}
        with ExitStack() as undo:
            undo.callback(self._reset)
            for watching in (self._prompts, self._labels, self._watching):
                undo.enter_context(watching.watching())
            undo.enter_context(replaced(self.family.model, "generate", self._generate))
            undo.enter_context(observe_attention(decoder, observed))
            undo.callback(decoder.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
            undo.callback(decoder.register_forward_hook(self._leave, always_call=True).remove)
            for at, layer in enumerate(self.layers[self.stages[0] :], self.stages[0]):
                stage = self.stages.index(at) if at in self.stages else None
                before = partial(self._before, stage, list(inspect.signature(layer.forward).parameters))
                undo.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            yield

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before, self._length = self._length, 0
        try:
            return generate(*args, **kwargs)
        finally:
            self._length = before

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.forget()
            raise

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._reset()
        if not self.active:
            return
        kwargs = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        cache = kwargs.get("past_key_values")
        self._prompts.inside = True
        with self._forgetting():
            refuse_static(cache)
            past = 0 if cache is None else cache.get_seq_length()
            if past == 0:
                self._start_prefill(kwargs)
            else:
                self._start_decoding(kwargs, cache, past)

    def _start_prefill(self, kwargs: dict[str, Any]) -> None:
        self._kept, self._cache = [], None
        prompt = self._prompts.take(kwargs)
        if prompt is None:  # text alone
            return
        added = len(kwargs.get("deepstack_visual_embeds") or ())
        if added > self.stages[0]:
            raise PruningError(
                f"{type(self.family.model).__name__} adds features to all visual tokens after each of its first "
                f"{added} layers, and tokens are to leave at layer {self.stages[0]}: choose layers from {added} on."
            )
        self._length = prompt.ids.shape[1] if self._length == 0 else self._length
        asks, labels = prompt.mask[:: prompt.beams] != 0, self._watching.arguments.get("labels")
        if self._length is not None:
            asks[:, self._length :] = False
        if labels is not None:
            asks[:, -labels.shape[1] :] &= (labels.to(asks.device) != -100).cumsum(1) == 0
        self._prefill = Prefill(prompt, asks)

    def _start_decoding(self, kwargs: dict[str, Any], cache: Any, past: int) -> None:
        ids = self._watching.arguments.get("input_ids")
        if ids is not None and ids.shape[1] > 1 and torch.isin(ids, ids.new_tensor(self.family.placeholder_ids)).any():
            raise PruningError(
                "An image came with a cache that holds the text before it, and would be read unpruned. Generate from "
                "the whole text again, with all of its images and without past_key_values."
            )
        if not self._kept and cache.get_seq_length(self.stages[-1]) == past:  # its prefill was not shortened
            return
        rows = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        own = self._cache() if self._cache is not None else None
        held = [(kept, cache.get_seq_length(at)) for at, kept in zip(self.stages, self._kept, strict=False)]
        later = {past - kept.mask.shape[1] for kept, _ in held} | {n - kept.order.shape[1] for kept, n in held}
        if own is not cache or len(later) != 1 or min(later) < 0 or len(rows) % len(self._kept[0].order):
            raise PruningError(
                "This cache was not filled by the last pruned prompt, or was changed since: it cannot be decoded from. "
                "Generate from the prompt again, and without assisted or prompt-lookup decoding."
            )
        self._later = later.pop() + rows.shape[1]

    def _last_row(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        if self._prefill is None:  # a decoding step chooses nothing
            return query.new_empty(0)
        return self._prefill.last_row(query, key, mask, scaling)

    def _see(self, attention: Tensor) -> None:
        if self._prefill is not None:
            self._prefill.attention = attention

    def _before(
        self, stage: int | None, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        first = {}
        if stage is not None and (self._prefill is not None or self._later):
            with self._forgetting():
                first = self._begin(stage, {**dict(zip(names, args, strict=False)), **kwargs})
        changes = {**self._changes, **first}
        return tuple(changes.pop(name, value) for name, value in zip(names, args, strict=False)), {**kwargs, **changes}

    def _begin(self, stage: int, given: dict[str, Any]) -> dict[str, Any]:
        """Sets what is changed for all layers of a stage; returns what is changed for its first one besides."""
        prefill, hidden = self._prefill, given["hidden_states"]
        if prefill is None:
            rows = self._kept[stage].repeated(len(hidden))
        else:
            hidden = prefill.narrow(self.choose(prefill.at(stage))).shorten(hidden)
            rows = prefill.rows
            if stage + 1 == len(self.stages):
                self._labels.leave_out(prefill.prompt.columns(prefill.tokens))
        if rows.whole:
            return {}
        flash = "flash" in str(self.family.decoder_config._attn_implementation)
        self._changes = {"attention_mask": layer_mask(given.get("attention_mask"), rows, self._later, flash)}
        if prefill is None:
            return {}
        if given.get("position_ids") is not None:
            self._changes["position_ids"] = of_columns(given["position_ids"][..., None], rows)[..., 0]
        if given.get("position_embeddings") is not None:
            self._changes["position_embeddings"] = tuple(of_columns(x, rows) for x in given["position_embeddings"])
        return {"hidden_states": hidden}

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._prompts.inside = False
        prefill = self._prefill
        self._reset()
        if prefill is None or output is None or prefill.rows.whole:
            return
        self._kept, cache = prefill.kept, output.get("past_key_values")
        self._cache = None if cache is None else weakref.ref(cache)
        output.last_hidden_state = prefill.rows.restore(output.last_hidden_state)
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(self._restored(at, x) for at, x in enumerate(output.hidden_states))

    def _restored(self, layer: int, hidden: Tensor | None) -> Tensor | None:
        """What entered a layer, before rows left there; what left the last one counts as one more."""
        begun = bisect_left(self.stages, layer)
        return hidden if begun == 0 or hidden is None else self._kept[begun - 1].restore(hidden)


def of_columns(values: Tensor, rows: Shortened) -> Tensor:
    """Values of a prompt's columns that are left: [..., 1 or R, L, D] -> [..., R, n, D]."""
    values = values.expand(*values.shape[:-3], len(rows.order), *values.shape[-2:])
    return values.gather(-2, rows.order[..., None].expand(*values.shape[:-2], -1, values.shape[-1]))


def layer_mask(mask: Tensor | None, rows: Shortened, later: int, flash: bool) -> Tensor | None:
    """A layer's mask over what is left of a prompt and over `later` columns after it, none at prefill.

    Args:
        mask: over all columns, [1 or R, h, Q, L + later], or [R, L + later] of flash attention; None: causal.
    """
    length, valid = rows.mask.shape[1], pad(rows.valid, (0, later), value=True)
    if flash:  # never None: gaps in position ids would be read as several packed sequences
        after = rows.mask.new_ones(len(valid), later) if mask is None else mask[:, length:]
        return torch.cat([rows.short_mask, after], 1)
    if mask is None and bool(valid.all()):
        return None
    if mask is None:  # a decoding step without a mask is of one row
        mask = torch.ones(1, 1, 1 if later else length, length + later, dtype=torch.bool, device=valid.device)
        mask = mask if later else mask.tril()
    if not later:
        return on_both_axes(mask, rows)
    mask = mask.expand(len(valid), -1, -1, -1)
    before = mask[..., :length].gather(3, rows.order[:, None, None].expand(-1, *mask.shape[1:3], -1))
    return hide(torch.cat([before, mask[..., length:]], 3), ~valid[:, None, None])
