"""Dropping of tokens inside the decoder: at the entry of one of its layers, or of several in turn.

Layers before the first stage read and cache the full prompt, so lengths and positions that outer code takes from the
first layer's cache stay right. From each stage on, layers get the mask and the positions of what is left, and cache no
more. Where some of them slide, each kind of layer has a mask and positions of its own, and windows are counted in
original columns. The decoder's output is handed back at full length.

The first stage may be the decoder's input: it is decided on there, as by `PruneAtDecoderInput`, and rows leave at the
entry of layer 0, when the decoder has made masks and positions of all columns. No layer's cache is whole then, so in
decoding steps masks are made of the columns that each holds.
"""

import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from catp_lightning.errors import PruningError
from catp_lightning.models.base import Family
from catp_lightning.prompt.attention import observe_attention
from catp_lightning.prompt.caches import (
    Opened,
    cache_in,
    foreign_cache,
    is_short,
    missing_in,
    refuse_static,
    rows_of,
    seal,
)
from catp_lightning.prompt.kept import KeptSequence
from catp_lightning.prompt.labels import Labels
from catp_lightning.prompt.masks import decoding_masks, layer_mask, of_columns, step_mask, window
from catp_lightning.prompt.merging import merged, written
from catp_lightning.prompt.prompt import DecoderPrompt
from catp_lightning.pruning.sites.base import Decide, PruningSite, Report, SiteSettings, ignored
from catp_lightning.pruning.sites.head import Head
from catp_lightning.pruning.sites.prompt_capture import PromptCapture
from catp_lightning.pruning.sites.stage_limits import layers_looked_at, refuse_stages
from catp_lightning.pruning.sites.stage_prompt import DecoderPrefill
from catp_lightning.utils.hooks import hooked
from catp_lightning.utils.signatures import parameters_of


class PruneAtDecoderLayers(PruningSite):
    """Prune rows at the entry of some of a decoder's layers; a prompt is decided on at each of these stages.

    Hidden states and attention maps are zero where a row was dropped; caches stay as short as they were computed.

    Raises:
        PruningError: the stages are no layers after the first, in ascending order; `compact` is True, though layers
            before the first stage have used the position ids; or the decoder's attention does not allow it.
    """

    reads, inside = "decoder", True

    def __init__(self, family: Family, decide: Decide, settings: SiteSettings, report: Report = ignored) -> None:
        super().__init__(family, decide, settings, report)
        refuse_stages(family, settings)
        self.stages, self.needs = settings.stages, settings.needs
        self.layers: list[Any] = list(family.decoder.get_submodule("layers").children())
        self.parameters = parameters_of(family.decoder.forward)
        self._config = family.decoder_config
        types = getattr(self._config, "layer_types", None) or [""] * len(self.layers)
        self._kinds = dict(enumerate(types))  # layers of one kind are called with the same mask and positions
        self._prompts, self._labels = PromptCapture(family, self.calls), Labels(self.calls, report)
        self._head = Head(family)
        self._looked_at = layers_looked_at(settings)
        self._kept: list[KeptSequence] = []  # columns kept at each stage of the last prefill; empty: all
        self._cache: weakref.ref[Any] | None = None  # the cache that this prefill filled
        self._opened = Opened()
        self._reset()

    def _reset(self) -> None:
        self._opened.close()
        self._prefill: DecoderPrefill | None = None  # the running prefill
        self._step: list[KeptSequence] = []  # columns left at each stage, in a running decoding step
        self._later = 0  # number of columns after the prompt, in a running decoding step
        self._mask: Tensor | None = None  # the caller's mask, in a decoding step that makes each layer's anew
        self._rows: KeptSequence | None = None  # columns left in the running stage; None: all
        self._changes: dict[str, dict[str, Any]] = {}  # replaced arguments of the running stage's layers, by their kind

    @contextmanager
    def installed(self) -> Iterator[None]:
        decoder: Any = self.family.decoder
        observed = {self.layers[at].self_attn: (partial(self._look, at), _nothing) for at in self._looked_at}
        with ExitStack() as undo:
            undo.callback(self._reset)
            for watching in (self._prompts, self._labels, self._head):
                undo.enter_context(watching.watching())
            undo.enter_context(observe_attention(decoder, observed))
            undo.enter_context(hooked(decoder, self._enter, self._leave, always=True))
            for at, layer in enumerate(self.layers[self.stages[0] :], self.stages[0]):
                before = partial(self._before, at, parameters_of(layer.forward))
                undo.enter_context(hooked(layer, before))
            yield

    @contextmanager
    def replaying(self, prompt: DecoderPrompt) -> Iterator[None]:
        with self._prompts.knowing(prompt), self.installed():
            yield

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._reset()
        if not self.active:
            return None
        kwargs = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        cache = cache_in(kwargs)
        self.calls.in_decoder = True
        refuse_static(cache)
        past = 0 if cache is None else cache.get_seq_length()
        return (), self._start_prefill(kwargs) if past == 0 else self._start_decoding(kwargs, cache, past)

    def _start_prefill(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        self._kept, self._cache = [], None
        prompt = self._prompts.take(kwargs)
        if prompt is None:  # text alone
            return kwargs
        added, inside = len(kwargs.get("deepstack_visual_embeds") or ()), next(at for at in self.stages if at)
        if added > inside:
            raise PruningError(
                f"{type(self.family.model).__name__} adds features to all visual tokens after each of its first "
                f"{added} layers, and tokens are to leave at layer {inside}: choose layers from {added} on."
            )
        cap = getattr(self._config, "attn_logit_softcapping", None)
        if self.stages[0]:
            self._prefill = DecoderPrefill(prompt, self.needs, cap)
            return kwargs
        selection = self.decide(prompt)
        embeds = prompt.embeds
        if selection.destination is not None:
            embeds = merged(embeds, prompt.visual, selection.destination)
            kwargs = {**kwargs, **self.family.merge_extras(kwargs, prompt.visual, selection.destination)}
        if selection.rows is not None:
            embeds = written(embeds, prompt.visual, selection.rows)
        if embeds is not prompt.embeds:
            prompt, kwargs = replace(prompt, embeds=embeds), {**kwargs, "inputs_embeds": embeds}
        self._prefill = DecoderPrefill(prompt, self.needs, cap)
        short = self._prefill.narrow(selection.keep)
        return kwargs if short.whole else {**kwargs, **self.family.gather_extras(kwargs, short, prompt.visual)}

    def _start_decoding(self, kwargs: dict[str, Any], cache: Any, past: int) -> dict[str, Any]:
        self._prompts.refuse_images(kwargs)
        if not self._kept and not is_short(cache) and cache.get_seq_length(self.stages[-1]) == past:
            return kwargs  # its prefill was not shortened
        rows = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        own, missing = self._cache() if self._cache is not None else None, missing_in(cache)
        cut = [part for kept in self._kept if (part := kept.cut(past)) is not None]  # `crop` may have taken text back
        held = [(kept, cache.get_seq_length(at) - missing) for at, kept in zip(self.stages, cut, strict=False)]
        later = {past - kept.mask.shape[1] for kept, _ in held} | {n - kept.order.shape[1] for kept, n in held}
        at = rows_of(cache)
        whole = len(cut) == len(self._kept) and len(later) == 1 and min(later) >= 0
        if own is not cache or not whole or at is None or len(at) != len(rows):
            raise foreign_cache()
        self._kept = cut
        self._step, self._later = [kept.of_rows(at) for kept in self._kept], later.pop() + rows.shape[1]
        entry = missing > 0  # no layer holds all columns
        if entry or window(self._config) is not None:  # masks are made of what each layer's cache holds
            length = self._step[0].mask.shape[1] + self._later
            self._mask = self._prompts.mask(kwargs, len(rows), length, rows.device)
        self._opened.open(cache)
        return {**kwargs, **self._without_whole_layer(kwargs, rows, cache)} if entry else kwargs

    def _without_whole_layer(self, kwargs: dict[str, Any], rows: Tensor, cache: Any) -> dict[str, Any]:
        """Return mask and positions of a decoding step, where the first layer's cache does not tell them."""
        mask, new = self._mask, rows.shape[1]
        assert mask is not None
        positions = self._prompts.step_positions(kwargs, mask, new)
        dtype = rows.dtype if rows.is_floating_point() else self.family.model.dtype
        masks = decoding_masks(self._step[0], mask, new, cache, self._config, dtype)
        return {"attention_mask": masks, "position_ids": positions}

    def _look(self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        if self._prefill is None:  # a decoding step chooses nothing
            return query.new_empty(0)
        return self._prefill.look(layer, query, key, mask, scaling)

    def _before(
        self, at: int, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._prefill is None and not self._later:
            return None
        kind, begins, first = self._kinds[at], at in self.stages, dict[str, Any]()
        if begins or kind not in self._changes:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            first = self._begin(self.stages.index(at), given) if begins else first
            self._shorten(at, given)
        changes = self._changes[kind]
        if not first and all(name in kwargs and kwargs[name] is value for name, value in changes.items()):
            return None  # a decoding step of prompts without padding has no mask
        changes = {**changes, **first}
        return tuple(changes.pop(name, value) for name, value in zip(names, args, strict=False)), {**kwargs, **changes}

    def _begin(self, stage: int, given: dict[str, Any]) -> dict[str, Any]:
        """Begin a stage: decide which rows are left. Return the arguments replaced in its first layer only."""
        prefill, hidden, self._changes = self._prefill, given["hidden_states"], {}
        if prefill is None:
            rows = self._step[stage]
        elif self.stages[stage] == 0:  # decided on before the decoder made masks and positions
            rows = prefill.rows
            hidden = rows.gather(hidden)
        else:
            selection = self.decide(prefill.at(stage, self.stages[stage], hidden))
            if selection.destination is not None:
                hidden = prefill.merged(hidden, selection.destination)
            hidden = prefill.narrow(selection.keep).gather(hidden)
            rows = prefill.rows
            if stage + 1 == len(self.stages):
                self._labels.leave_out(prefill.prompt.columns(prefill.tokens))
        self._rows = None if rows.whole else rows
        return {} if prefill is None or rows.whole else {"hidden_states": hidden}

    def _shorten(self, at: int, given: dict[str, Any]) -> None:
        """Make the arguments replaced in the running stage, in layers of the kind of layer `at`."""
        rows, config = self._rows, self._config
        changes = self._changes[self._kinds[at]] = dict[str, Any]()
        if rows is None:
            return
        mask: Tensor | None
        flash = "flash" in str(config._attn_implementation)
        if self._mask is not None and not (flash and window(config) is None):
            hidden, cache = given["hidden_states"], cache_in(given)
            mask = step_mask(rows, self._mask, hidden.shape[1], cache, at, config, hidden.dtype)
        else:
            mask = given.get("attention_mask") if self._mask is None else self._mask
            mask = layer_mask(mask, rows, self._later, flash)
        changes["attention_mask"] = mask
        if self._prefill is not None:
            if given.get("position_ids") is not None:
                changes["position_ids"] = of_columns(given["position_ids"][..., None], rows)[..., 0]
            if given.get("position_embeddings") is not None:
                changes["position_embeddings"] = tuple(of_columns(x, rows) for x in given["position_embeddings"])

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.calls.in_decoder = False
        prefill, step, later = self._prefill, self._step, self._later
        self._reset()
        kept = step if prefill is None else prefill.kept
        if kept and output is not None and output.get("attentions") is not None:
            maps, cache = enumerate(output.attentions), cache_in(output)
            output.attentions = tuple(self._attention(layer, paid, kept, later, cache) for layer, paid in maps)
        if prefill is None or prefill.rows.whole:
            return
        cache = cache_in(kwargs if output is None else output)
        if cache is not None:  # also after a failed call, which filled a part of it
            every = torch.arange(len(prefill.rows.order), dtype=torch.long, device=prefill.rows.order.device)
            seal(cache, every, 0 if self.stages[0] else prefill.kept[0].mask.shape[1] - prefill.kept[0].order.shape[1])
        if output is None:
            return
        self._kept, self._cache = prefill.kept, None if cache is None else weakref.ref(cache)
        full = prefill.rows.scatter(output.last_hidden_state)
        output.last_hidden_state = self._head.expect(full, prefill.rows)
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(self._restored(at, x) for at, x in enumerate(output.hidden_states))

    def _restored(self, layer: int, hidden: Tensor | None) -> Tensor | None:
        """Return what entered a layer, before rows were dropped there, at full length.

        What left the last layer counts as the input of one more. Rows that leave at the decoder's input enter no layer.
        """
        begun = bisect_left(self.stages, layer) if layer else bisect_right(self.stages, 0)
        if begun == 0 or hidden is None:
            return hidden
        rows = self._kept[begun - 1]
        if hidden.shape[1] == rows.mask.shape[1]:  # a model that collects them itself, before layer 0
            hidden = rows.gather(hidden)
        return rows.scatter(hidden)

    def _attention(
        self, layer: int, paid: Tensor | None, kept: list[KeptSequence], later: int, cache: Any
    ) -> Tensor | None:
        """Return a layer's attention maps over the columns of the unpruned layer, zeros where a row was dropped."""
        begun = bisect_right(self.stages, layer)
        if begun == 0 or paid is None:
            return paid
        rows = kept[begun - 1]
        if not later:
            return rows.scatter_attention(paid)
        full = rows.scatter_keys(pad(paid, (rows.order.shape[1] + later - paid.shape[3], 0)))
        reach = window(self._config) if cache.layers[layer].is_sliding else None
        return full if reach is None else full[..., -(reach - 1 + paid.shape[2]) :]  # the rest has left its cache


def _nothing(value: Tensor) -> None:
    """No-op: the prefill has already recorded the attention."""
