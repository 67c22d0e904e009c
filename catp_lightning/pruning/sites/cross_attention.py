"""Dropping of image rows in a model whose text reads them by cross-attention: Llama-3.2-Vision.

The unpruned model stores keys and values of every tile in every cross-attention layer, including the empty tiles that
pad an image. Here, rows that no text sees are never stored, dropped rows leave after the first cross-attention layer
(its own cache included), and rows that only earlier text saw leave each layer's cache once that layer has run. So the
prompt reads dropped rows in the first cross-attention layer; generated tokens read them nowhere, with or without a
cache.

A text row that sees no image is left unmasked by the model and attends to all image rows, padding included: in prefill,
its output is computed from the full states. No text row is dropped.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from catp_lightning.errors import PruningError
from catp_lightning.methods.observation import Signal
from catp_lightning.models.base import Family
from catp_lightning.models.mllama import Mllama
from catp_lightning.prompt.caches import (
    CACHE_NAMES,
    Opened,
    cache_in,
    foreign_cache,
    is_short,
    kind_of,
    layers_of,
    mark_whole,
    refuse_static,
    rows_of,
    seal,
)
from catp_lightning.prompt.prompt import CrossAttended
from catp_lightning.prompt.visibility import TextVisibility, attention_of
from catp_lightning.pruning.sites.base import PLAIN, Decide, PruningSite, Report, SiteSettings, ignored
from catp_lightning.pruning.sites.image_rows import CachedRows, CrossAttentionPrefill, SharedImages
from catp_lightning.utils.hooks import hooked
from catp_lightning.utils.on_cpu import of_known, on_cpu, on_device, places, read_once


class PruneCrossAttention(PruningSite):
    """Prune the image rows that one model reads by cross-attention.

    A prompt is decided on after the first cross-attention layer of each prefill; without any token to choose from if
    its text sees no image. No text row is dropped, and no label is left out of the loss.

    Attributes:
        prompt_length: number of columns of a prompt that is called together with its answer, as if the answer had been
            generated; None in all other calls.
        shared: images that the next call's prompts read, if their keys and values are shared with other calls.
    """

    reads = "cross-attention"
    family: Mllama
    prompt_length: int | None = None
    shared: SharedImages | None = None

    def __init__(
        self, family: Family, decide: Decide, settings: SiteSettings = PLAIN, report: Report = ignored
    ) -> None:
        super().__init__(family, decide, settings, report)
        self._modules = self.family.cross_attention
        self.observe = Signal.CROSS_ATTENTION_TO_IMAGE in self.settings.needs  # prompts are to have `attention`
        self._opened = Opened()
        self._reset()

    @staticmethod
    def outer(family: Family) -> nn.Module:
        return family.model

    def _reset(self) -> None:
        self._opened.close()
        self._text_arguments: Mapping[str, Any] = {}  # arguments of the running call of the text model
        self._prefill: CrossAttentionPrefill | None = None  # the running prefill
        # Gives the replaced arguments of each cross-attention layer in the running call; None: none are replaced.
        self._changes: Callable[[nn.Module], dict[str, Any]] | None = None
        self._length: int | None = None  # columns of the prompt of the running `generate`
        self._stored: CachedRows | None = None  # what the last prefill cached

    @contextmanager
    def installed(self) -> Iterator[None]:
        decoder = self.family.decoder
        with ExitStack() as undo:
            undo.callback(self._reset)
            undo.enter_context(self.calls.watching())
            undo.enter_context(hooked(decoder, self._enter, self._leave, always=True))
            for module in self._modules:
                undo.enter_context(hooked(module, self._before, self._after))
            yield

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._prefill = self._changes = None
        if not self.active:
            return
        self._text_arguments = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
        cache, states = cache_in(kwargs), kwargs.get("cross_attention_states")
        held = _image_rows(cache, self._modules[0].layer_idx)
        if states is None and held == 0:  # text alone
            if cache is None or cache.get_seq_length() == 0:
                text = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
                self._record_nothing(text.new_zeros(len(text), 0, dtype=torch.bool), text.new_zeros(len(text), 0, 0))
            return
        if getattr(self.family.decoder, "gradient_checkpointing", False) and self.family.decoder.training:
            raise PruningError(
                "Rows cannot leave while gradients are checkpointed: layers run a second time, after the call. Use "
                "model.gradient_checkpointing_disable(), or put the model in evaluation mode."
            )
        if states is None and is_short(cache) is False:  # it holds all rows, and the model's own masks are right
            return
        _refuse_other(cache)
        if kwargs.get("output_attentions", getattr(self.family.decoder.config, "output_attentions", False)):
            raise PruningError(
                "Attention to image rows cannot be shown while rows are dropped: text before an image reads all of "
                "them, other text only those that stay. Leave output_attentions out; output_hidden_states works."
            )
        visibility = TextVisibility.of(kwargs, self.family.rows_per_tile)
        if states is None:
            self._decode(cache, held, visibility)
            return
        if held:
            raise PruningError(
                "An image came with a cache that holds image rows already, and cannot be added to it. Generate "
                "from the whole text again, with all of its images and without a cache."
            )
        labels = self.calls.arguments.get("labels")
        visibility, copies = visibility.read(*([] if labels is None else [labels]))
        for copy in copies:
            self.calls.arguments.know("labels", copy)
        self._length = self.prompt_length or self.calls.prompt_length(visibility.real.shape[1])
        states = states.reshape(len(visibility.real), -1, states.shape[-1])
        self._prefill = CrossAttentionPrefill(visibility, states, self.shared)
        if bool(on_cpu(self._prefill.tokens)[0].any()):
            self._changes = self._prefill.changes
        else:
            self._record_nothing(self._prefill.tokens, self._prefill.states)

    def _record_nothing(self, tokens: Tensor, states: Tensor) -> None:
        """Record an empty choice for a prompt whose text sees no image."""
        beams = self.calls.rows_per_sample(len(tokens))
        nothing = tokens.new_zeros(len(tokens[::beams]), 0)
        text = self._text_arguments
        self.decide(CrossAttended(tokens[::beams], self.calls.arguments, beams, states[::beams], None, nothing, text))

    def _decode(self, cache: Any, held: int, visibility: TextVisibility) -> None:
        at = rows_of(cache)
        if self._stored is None or not self._stored.is_in(cache, held) or at is None or len(at) != len(visibility.real):
            raise foreign_cache()
        call = self.calls.user_call  # `generate` itself extends the mask by its last row, after its first call
        changes = self._stored.changes(visibility, at, check=not (call.begun and call is not self.calls.arguments))
        self._opened.open(cache)
        self._changes = lambda module: changes

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (args, {**kwargs, **self._changes(module)}) if self._changes else None

    def _after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        prefill = self._prefill
        if prefill is None:
            return None
        cache = cache_in(kwargs) if prefill.shared is None else None
        read, used = prefill.repaired(module, kwargs["hidden_states"], output[0]), prefill.rows
        if self._changes and module is self._modules[0]:
            self._narrow(prefill, module, kwargs)
            read = self._without_dropped(prefill, module, kwargs["hidden_states"], read)
        if cache is not None:
            prefill.cut_cache(cache, module.layer_idx, used)
        return (read, *output[1:])

    def _narrow(self, prefill: CrossAttentionPrefill, module: nn.Module, kwargs: dict[str, Any]) -> None:
        beams = self.calls.rows_per_sample(len(prefill.tokens))
        tokens, states = of_known(lambda part: part[::beams], prefill.tokens), prefill.states[::beams]
        call = self.calls.arguments
        labels = None if call.get("labels") is None else call.on_cpu("labels")
        is_prompt = _before_labels(on_cpu(prefill.visibility.of_text)[0].any(2), labels)
        if self._length is not None:
            is_prompt[:, self._length :] = False
        is_prompt = on_device(is_prompt, tokens.device)
        attention = self._attention(prefill, module, kwargs, is_prompt, beams) if self.observe else None
        text = self._text_arguments
        prompt = CrossAttended(tokens, self.calls.arguments, beams, states, attention, is_prompt[::beams], text)
        keep = of_known(torch.logical_and, read_once(self.decide(prompt).keep), tokens)
        if not torch.equal(*on_cpu(keep, tokens)):
            prefill.narrow(of_known(lambda part: part.repeat_interleave(beams, 0), keep))

    def _without_dropped(self, prefill: CrossAttentionPrefill, module: Any, hidden: Tensor, read: Tensor) -> Tensor:
        """Return the first layer's output in which rows that were generated without a cache read kept image rows only.

        These are the image rows that a cache would hold. `read`, the layer's output over all rows, is [R, L, D].
        """
        if self._length is None or hidden.shape[1] <= self._length:
            return read
        mask = prefill.mask[:, :, self._length :]
        again = module.forward(hidden[:, self._length :], **{**prefill.changes(module), "attention_mask": mask})
        return torch.cat([read[:, : self._length], again[0]], 1)

    @torch.no_grad()
    def _attention(
        self,
        prefill: CrossAttentionPrefill,
        module: nn.Module,
        kwargs: dict[str, Any],
        is_prompt: Tensor,
        beams: int,
    ) -> Tensor:
        hidden, states, mask = (kwargs[k] for k in ("hidden_states", "cross_attention_states", "attention_mask"))
        paid = torch.stack(
            [
                attention_of(module, hidden[row, at], states[row], mask[row, 0, at])
                for row, own in enumerate(on_cpu(is_prompt)[0])
                if row % beams == 0
                for at in [places(own, hidden)]
            ]
        )
        order = prefill.rows.order[::beams, None].expand_as(paid)
        return paid.new_zeros(*paid.shape[:2], prefill.tokens.shape[1]).scatter(2, order, paid)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._opened.close()
        self.calls.user_call.begun = True
        prefill, self._prefill, self._changes, self._text_arguments = self._prefill, None, None, {}
        if prefill is None:
            return
        cache, stored = cache_in(kwargs if output is None else output), prefill.stored
        if cache is not None and stored is not None and prefill.complete and output is not None:
            mark_whole(cache)
        elif cache is not None and stored is not None:  # also after a failed call, which filled a part of it
            seal(cache, torch.arange(len(prefill.states), dtype=torch.long, device=prefill.states.device))
        if output is not None:
            self._stored = stored


def _image_rows(cache: Any, layer: int) -> int:
    """Return the number of image rows that a cache holds in layer `layer`."""
    layers = getattr(cache, "layers", ())
    filled = layer < len(layers) and layers[layer].is_initialized and layers[layer].keys.numel() > 0
    return int(layers[layer].keys.shape[2]) if filled else 0


def _refuse_other(cache: Any) -> None:
    """Raise PruningError if a cache has layers that cannot be shortened."""
    refuse_static(cache)
    other = {kind_of(layer).__name__ for layer in layers_of(cache) if kind_of(layer) is not DynamicLayer}
    if other:
        raise PruningError(
            f"A cache of {', '.join(sorted(other))} cannot be pruned, one of DynamicLayer can. "
            "Leave cache_implementation at its default."
        )


def _before_labels(sees: Tensor, labels: Tensor | None) -> Tensor:
    """Return which text rows see an image and precede the first label, bool [R, L]; all on the CPU.

    If none does, it is the first row that sees an image. `sees`, bool [R, L], are all text rows that see one.
    """
    if labels is None:
        return sees
    answer = torch.zeros_like(sees)
    answer[:, -labels.shape[1] :] = (labels != -100).cumsum(1) > 0
    prompt = sees & ~answer
    return prompt | (sees & (sees.cumsum(1) == 1) & ~prompt.any(1, keepdim=True))
