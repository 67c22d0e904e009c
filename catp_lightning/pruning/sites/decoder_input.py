"""Dropping of tokens at the entry of the text decoder, whose output is handed back at full length.

Outer code (labels, `logits[:, -1]`, generate, beams) never notices. Position ids stay those of the full prompt. During
cached decoding the mask is rebuilt from the original column of every cached key.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from catp_lightning.errors import PruningError
from catp_lightning.models.base import Family
from catp_lightning.prompt.caches import (
    Opened,
    cache_in,
    foreign_cache,
    is_short,
    mark_whole,
    refuse_static,
    rows_of,
    seal,
)
from catp_lightning.prompt.kept import KeptSequence, kept_sequence, of_each
from catp_lightning.prompt.labels import Labels
from catp_lightning.prompt.masks import decoding_masks, prefill_masks, recurrent
from catp_lightning.prompt.merging import merged, written
from catp_lightning.prompt.prompt import DecoderPrompt
from catp_lightning.prompt.turns import Turn
from catp_lightning.pruning.sites.base import PLAIN, Decide, PruningSite, Report, SiteSettings, ignored
from catp_lightning.pruning.sites.head import Head
from catp_lightning.pruning.sites.prompt_capture import PromptCapture
from catp_lightning.utils.hooks import hooked
from catp_lightning.utils.signatures import parameters_of


class PruneAtDecoderInput(PruningSite):
    """Prune rows at the entry of one model's decoder."""

    reads = "decoder"

    def __init__(
        self, family: Family, decide: Decide, settings: SiteSettings = PLAIN, report: Report = ignored
    ) -> None:
        super().__init__(family, decide, settings, report)
        self.compact = self.settings.compact
        self.parameters, self._config = parameters_of(family.decoder.forward), family.decoder_config
        self._prompts, self._labels = PromptCapture(family, self.calls), Labels(self.calls, report)
        self._head = Head(family)
        self._prompt: KeptSequence | None = None  # what the last prefill kept, for its decoding steps
        self._now: KeptSequence | None = None  # the same for the running call
        self._own: KeptSequence | None = None  # what a running prefill keeps of its own columns
        self._restored: Callable[[Tensor], Tensor]  # puts the running call's output in its places
        self._filling = False  # True if the running call is a prefill, or adds an image to a cache
        self._opened = Opened()

    @contextmanager
    def installed(self) -> Iterator[None]:
        decoder = self.family.decoder
        with ExitStack() as undo:
            undo.callback(self._opened.close)
            undo.enter_context(self._prompts.watching())
            undo.enter_context(self._head.watching())
            undo.enter_context(self._labels.watching())
            undo.enter_context(hooked(decoder, self._enter, self._leave, always=True))
            yield

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.active:
            return None
        return (), self._changed({**dict(zip(self.parameters, args, strict=False)), **kwargs})

    def _changed(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        cache = cache_in(kwargs)
        refuse_static(cache)
        past = 0 if cache is None else cache.get_seq_length()  # columns read so far, dropped ones too
        self.calls.in_decoder, self._now, self._own, self._filling = True, None, None, past == 0
        if past == 0:
            self._prompt = None
        prompt = self._prompts.take(kwargs, past)
        if prompt is not None:
            return self._prefill(kwargs, prompt, past)
        return self._decode(kwargs, past) if past else kwargs

    def _prefill(self, kwargs: dict[str, Any], prompt: DecoderPrompt, past: int) -> dict[str, Any]:
        cache, config, embeds = cache_in(kwargs), self._config, prompt.embeds
        before = self._held(cache, past, len(embeds)) if past else None
        selection = self.decide(prompt)
        keep = prompt.columns(selection.keep)
        short = kept_sequence(keep, prompt.mask, recurrent(config))
        self._filling = True
        if short.whole and before is None:
            return kwargs
        if self.compact and prompt.positions.dim() > 2:
            raise PruningError(
                'positions="compact" has no meaning here: visual tokens have coordinates in their image, not places in '
                'a row, and dropping them leaves no gap. Use positions="original".'
            )
        if past and recurrent(config) and not short.even:
            raise PruningError(
                f"{type(self.family.model).__name__} has layers with a recurrent state, which read rows in turn, and "
                "samples keep different numbers of tokens of images that came with a cache: what fills up the shorter "
                "ones would change their state. Give each sample a call of its own, or keep a number of tokens, an int."
            )
        mask = self._prompts.mask(kwargs, len(embeds), past + embeds.shape[1], embeds.device)
        turn = Turn.of(before, mask, short)
        self._prompt, self._now, self._own = turn.kept, turn.kept, turn.own
        self._restored = turn.scatter
        self._labels.leave_out(keep)
        if selection.destination is not None:
            embeds = merged(embeds, prompt.visual, selection.destination)
            kwargs = {**kwargs, **self.family.merge_extras(kwargs, prompt.visual, selection.destination)}
        if selection.rows is not None:
            embeds = written(embeds, prompt.visual, selection.rows)
        if before is not None:
            self._opened.open(cache)
        given = kwargs.get("attention_mask")
        if past:
            masks = turn.masks(given, cache, config, embeds.dtype)
        else:
            masks = prefill_masks(given, short, config, embeds.dtype)
        return {
            **kwargs,
            **self.family.gather_extras(kwargs, short, prompt.visual),
            "inputs_embeds": short.gather(embeds),
            "attention_mask": masks,
            "position_ids": turn.positions(prompt.positions, self.compact),
        }

    def _held(self, cache: Any, past: int, rows: int) -> KeptSequence | None:
        """Return what a cache holds of the prompt that filled it; None if it holds all columns.

        Args:
            cache: the cache.
            past: number of columns that were read into it.
            rows: number of rows of the call that continues it.

        Raises:
            PruningError: a prompt was shortened, and the cache is not the one that it filled.
        """
        prompt, short = self._prompt, is_short(cache)
        if short is False or (short is None and prompt is None):
            return None
        at, own = rows_of(cache), None if prompt is None or prompt.cache is None else prompt.cache()
        prompt = None if prompt is None or own is not cache else prompt.cut(past)  # `crop` may have taken text back
        if prompt is None or at is None or len(at) != rows:
            raise foreign_cache()
        self._prompt = prompt
        return prompt.of_rows(at)

    def _decode(self, kwargs: dict[str, Any], past: int) -> dict[str, Any]:
        cache = cache_in(kwargs)
        rows = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        batch, new = rows.shape[:2]
        prompt = self._held(cache, past, batch)
        if prompt is None:
            return kwargs
        mask = self._prompts.mask(kwargs, batch, past + new, rows.device)
        positions = self._prompts.step_positions(kwargs, mask, new)
        if self.compact:
            positions = positions - prompt.dropped[:, None] * mask[:, -new:]
        dtype = self.family.model.dtype if not rows.is_floating_point() else rows.dtype
        self._now = prompt
        self._restored = partial(prompt.scatter_step, later=mask.shape[1] - prompt.mask.shape[1])
        self._opened.open(cache)
        masks = decoding_masks(prompt, mask, new, cache, self._config, dtype)
        return {**kwargs, "attention_mask": masks, "position_ids": positions}

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self.calls.in_decoder, self.calls.user_call.begun = False, True
        self._opened.close()
        (prompt, own), self._now, self._own = (self._now, self._own), None, None
        cache = cache_in(kwargs if output is None or isinstance(output, tuple) else output)
        if prompt is None:
            if cache is not None and output is not None and self._filling:
                mark_whole(cache)
            return output
        if self._filling and cache is not None:  # also after a failed call, which filled a part of it
            rows = torch.arange(len(prompt.order), dtype=torch.long, device=prompt.order.device)
            seal(cache, rows, prompt.mask.shape[1] - prompt.order.shape[1])
            prompt.cache = None if output is None else weakref.ref(cache)
        output = of_each(output, self._restored)
        if own is not None and output is not None:
            self._head.expect(output[0], own)
        return output
