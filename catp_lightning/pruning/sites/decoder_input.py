"""Dropping of tokens at the entry of the text decoder, whose output is handed back at full length.

Outer code (labels, `logits[:, -1]`, generate, beams) never notices. Position ids stay those of the full prompt. During
cached decoding the mask is rebuilt from the original column of every cached key.
"""

import inspect
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from catp_lightning.errors import PruningError
from catp_lightning.models.base import Family
from catp_lightning.prompt.caches import Opened, foreign_cache, is_short, mark_whole, refuse_static, rows_of, seal
from catp_lightning.prompt.kept import KeptSequence, kept_sequence, of_each
from catp_lightning.prompt.labels import Labels
from catp_lightning.prompt.masks import decoding_masks, prefill_masks, recurrent, two_dimensional
from catp_lightning.prompt.merging import merged
from catp_lightning.pruning.sites.base import PLAIN, Decide, PruningSite, Report, SiteSettings, ignored
from catp_lightning.pruning.sites.prompt_capture import PromptCapture
from catp_lightning.utils.hooks import hooked


class PruneAtDecoderInput(PruningSite):
    """Prune rows at the entry of one model's decoder."""

    reads = "decoder"

    def __init__(
        self, family: Family, decide: Decide, settings: SiteSettings = PLAIN, report: Report = ignored
    ) -> None:
        super().__init__(family, decide, settings, report)
        self.compact = self.settings.compact
        self.parameters = list(inspect.signature(family.decoder.forward).parameters)
        self._prompts, self._labels = PromptCapture(family, self.calls), Labels(self.calls, report)
        self._prompt: KeptSequence | None = None  # what the last prefill kept, for its decoding steps
        self._now: KeptSequence | None = None  # the same for the running call
        self._filling = False  # True if the running call is a prefill
        self._opened = Opened()

    @contextmanager
    def installed(self) -> Iterator[None]:
        decoder = self.family.decoder
        with ExitStack() as undo:
            undo.callback(self._opened.close)
            undo.enter_context(self._prompts.watching())
            undo.enter_context(self._labels.watching())
            undo.enter_context(hooked(decoder, self._enter, self._leave, always=True))
            yield

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.active:
            return None
        return (), self._changed({**dict(zip(self.parameters, args, strict=False)), **kwargs})

    def _changed(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        cache = kwargs.get("past_key_values")
        refuse_static(cache)
        past = 0 if cache is None else cache.get_seq_length()
        self.calls.in_decoder, self._now, self._filling = True, None, past == 0
        return self._prefill(kwargs) if past == 0 else self._decode(kwargs, past)

    def _prefill(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        self._prompt = None
        prompt = self._prompts.take(kwargs)
        if prompt is None:  # text alone
            return kwargs
        selection = self.decide(prompt)
        keep = prompt.columns(selection.keep)
        short = kept_sequence(keep, prompt.mask, recurrent(self.family.decoder_config))
        if short.whole:
            return kwargs
        if self.compact and prompt.positions.dim() > 2:
            raise PruningError(
                'positions="compact" has no meaning here: visual tokens have coordinates in their image, not places in '
                'a row, and dropping them leaves no gap. Use positions="original".'
            )
        self._prompt = self._now = short
        self._labels.leave_out(keep)
        config, embeds, destination = self.family.decoder_config, prompt.embeds, selection.destination
        if destination is not None:
            embeds = merged(embeds, prompt.visual, destination)
            kwargs = {**kwargs, **self.family.merge_extras(kwargs, prompt.visual, destination)}
        return {
            **kwargs,
            **self.family.gather_extras(kwargs, short),
            "inputs_embeds": short.gather(embeds),
            "attention_mask": prefill_masks(kwargs.get("attention_mask"), short, config, embeds.dtype),
            "position_ids": short.gather_positions(prompt.positions, self.compact),
        }

    def _decode(self, kwargs: dict[str, Any], past: int) -> dict[str, Any]:
        self._prompts.refuse_images()
        prompt, cache = self._prompt, kwargs["past_key_values"]
        short = is_short(cache)
        if short is False or (short is None and prompt is None):  # its prefill was not shortened
            return kwargs
        rows = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        batch, new = rows.shape[:2]
        own = prompt.cache() if prompt is not None and prompt.cache is not None else None
        if prompt is None or own is not cache or past < prompt.order.shape[1]:
            raise foreign_cache()
        self._prompts.refuse_continuing()
        full_length = prompt.mask.shape[1] + past - prompt.order.shape[1] + new
        mask = two_dimensional(self._prompts.mask(kwargs), batch, full_length, rows.device)
        at = rows_of(cache)
        if at is None or len(at) != batch:
            raise foreign_cache()
        prompt = self._now = prompt.of_rows(at)
        positions = self._prompts.positions(kwargs)
        if positions is None:
            positions = self.family.positions(mask)[..., -new:]
        if self.compact:
            positions = positions - prompt.dropped[:, None]
        dtype = self.family.model.dtype if not rows.is_floating_point() else rows.dtype
        masks = decoding_masks(prompt, mask, new, cache, self.family.decoder_config, dtype)
        self._opened.open(cache)
        return {**kwargs, "attention_mask": masks, "position_ids": positions}

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self.calls.in_decoder = False
        self._opened.close()
        prompt, self._now = self._now, None
        cache = kwargs.get("past_key_values")
        if output is not None and not isinstance(output, tuple):
            cache = output.get("past_key_values")
        if prompt is None:
            if cache is not None and output is not None and self._filling:
                mark_whole(cache)
            return output
        if self._filling and cache is not None:  # also after a failed call, which filled a part of it
            seal(cache, torch.arange(len(prompt.order), dtype=torch.long, device=prompt.order.device))
            prompt.cache = None if output is None else weakref.ref(cache)
        return of_each(output, prompt.scatter_states if self._filling else prompt.scatter_step)
