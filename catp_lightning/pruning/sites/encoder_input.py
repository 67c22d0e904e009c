"""Dropping of tokens at the entry of the encoder of an encoder-decoder language model (T5).

T5 has no position ids; it adds a bias by relative position to its attention. Block 0 computes the bias once for all
blocks, here from the rows' original positions. The decoder's cross-attention sees the rows that stayed.
"""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from catp_lightning.errors import PruningError
from catp_lightning.models.base import Family
from catp_lightning.prompt.caches import Opened, cache_in, is_short, seal
from catp_lightning.prompt.kept import KeptSequence, kept_sequence, of_each
from catp_lightning.prompt.masks import two_dimensional
from catp_lightning.prompt.prompt import DecoderPrompt
from catp_lightning.pruning.sites.base import PLAIN, Decide, PruningSite, Report, SiteSettings, ignored
from catp_lightning.pruning.sites.encoder_states import NOT_OF_THIS_PROMPT, PrunedStates
from catp_lightning.pruning.sites.prompt_capture import PromptCapture
from catp_lightning.utils.hooks import hooked
from catp_lightning.utils.signatures import parameters_of


class PruneAtEncoderInput(PruningSite):
    """Prune rows at the entry of one language model's encoder.

    Nothing is merged, and no label is left out of the loss: labels belong to the decoder, of which nothing is dropped.
    """

    reads = "encoder"

    def __init__(
        self, family: Family, decide: Decide, settings: SiteSettings = PLAIN, report: Report = ignored
    ) -> None:
        super().__init__(family, decide, settings, report)
        self.compact = self.settings.compact
        self._prompts = PromptCapture(family, self.calls)
        self._prompt: KeptSequence | None = None
        self._caches: weakref.WeakKeyDictionary[Any, KeptSequence] = weakref.WeakKeyDictionary()
        self._handed_out: weakref.ref[Tensor] | None = None  # encoder states at full length
        self._opened = Opened()
        self._rows: Tensor | None = None  # row of the prompt for each row of the decoder's batch; None: nothing dropped
        language_model: Any = family.language_model
        self.encoder, self.text_decoder = language_model.encoder, language_model.decoder
        self._block_names = parameters_of(self.encoder.block[0].forward)

    @contextmanager
    def installed(self) -> Iterator[None]:
        with self._prompts.watching(), self._hooked():
            yield

    @contextmanager
    def replaying(self, prompt: DecoderPrompt) -> Iterator[None]:
        with self._prompts.knowing(prompt), self._hooked():
            yield

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        with ExitStack() as undo:
            undo.callback(self._opened.close)
            for module, hook in (
                (self.encoder, self._enter),
                (self.encoder.block[0], self._biased),
                (self.text_decoder, self._cross),
            ):
                undo.enter_context(hooked(module, hook))
            undo.enter_context(hooked(self.encoder, after=self._encoded))
            undo.enter_context(hooked(self.text_decoder, after=self._filled, always=True))
            undo.enter_context(hooked(self.family.language_model, after=self._restore))
            yield

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._prompt = self._handed_out = None
        if not self.active:
            return None
        prompt = self._prompts.take(kwargs)
        if prompt is None:  # text alone
            return None
        short = kept_sequence(prompt.columns(self.decide(prompt).keep), prompt.mask)
        if short.whole:
            return None
        self._prompt = short
        changed = {"inputs_embeds": short.gather(prompt.embeds), "attention_mask": short.short_mask}
        return args, {**kwargs, **changed}

    def _biased(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._prompt is None:
            return None
        arguments = {**dict(zip(self._block_names, args, strict=False)), **kwargs}
        first: Any = module
        bias = self._bias(first.layer[0].SelfAttention, self._prompt)
        bias, mask = bias.to(arguments["hidden_states"].dtype), arguments.get("attention_mask")
        if mask is not None:  # older versions of transformers add the mask to their own bias only
            hidden = ~mask if mask.dtype == torch.bool else mask < 0
            bias = bias.masked_fill(hidden, torch.finfo(bias.dtype).min)
        changes = {"position_bias": bias}  # an argument that was passed by position is replaced by position
        names = zip(self._block_names, args, strict=False)
        return tuple(changes.pop(name, value) for name, value in names), {**kwargs, **changes}

    def _bias(self, attention: Any, prompt: KeptSequence) -> Tensor:
        """Return block 0's position bias of the n kept rows, [R, H, n, n].

        It is computed as T5's own code computes it for neighbouring positions.
        """
        columns = torch.arange(prompt.mask.shape[1], device=prompt.order.device).expand(prompt.mask.shape)
        positions = prompt.gather_positions(columns, self.compact)
        buckets = attention._relative_position_bucket(
            positions[:, None] - positions[:, :, None],
            bidirectional=True,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        return attention.relative_attention_bias(buckets).permute(0, 3, 1, 2)

    def _encoded(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Scatter the encoder's hidden states and attention maps of single layers to full length.

        The last hidden state stays short, because the decoder reads it.
        """
        prompt = self._prompt
        if prompt is None:
            return output
        if isinstance(output, tuple):
            return (output[0], *of_each(output[1:], prompt.scatter_states))
        for name in ("hidden_states", "attentions"):
            if output.get(name) is not None:
                output[name] = of_each(output[name], prompt.scatter_states)
        return output

    def _cross(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        states, prompt, cache = kwargs.get("encoder_hidden_states"), self._prompt, cache_in(kwargs)
        self._rows = None
        if not self.active or states is None:
            return None
        self._check_cache(cache)
        full = None if self._handed_out is None else self._handed_out()
        if isinstance(states, PrunedStates):  # a hand-written decoding loop passes them back in
            if prompt is None or states is not full:
                raise PruningError(NOT_OF_THIS_PROMPT.format("These encoder states were"))
            states = prompt.gather(states.as_subclass(Tensor))
        if prompt is None:
            return None
        rows = torch.arange(len(prompt.order), dtype=torch.long, device=prompt.order.device)
        if cache is not None and cache.get_seq_length() > 0:
            rows = self._opened.open(cache)
        elif len(states) % len(rows) == 0:  # beams are expanded after the encoder
            rows = rows.repeat_interleave(len(states) // len(rows))
        if states.shape[1] != prompt.order.shape[1] or len(states) != len(rows):
            raise PruningError(NOT_OF_THIS_PROMPT.format("These encoder states were"))
        self._rows, prompt = rows, prompt.of_rows(rows)
        mask = two_dimensional(
            kwargs.get("encoder_attention_mask"), len(states), prompt.mask.shape[1], prompt.order.device
        )
        mask = prompt.gather(mask) * prompt.valid
        return args, {**kwargs, "encoder_hidden_states": states, "encoder_attention_mask": mask}

    def _check_cache(self, cache: Any) -> None:
        """Raise PruningError if a filled cache belongs to another prompt than the last and either was pruned."""
        if cache is None or cache.get_seq_length() == 0:
            return
        if self._caches.get(cache) is not self._prompt or (self._prompt is None and is_short(cache)):
            raise PruningError(NOT_OF_THIS_PROMPT.format("This cache was"))

    def _filled(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._opened.close()
        rows, prompt, self._rows = self._rows, self._prompt, None
        if rows is None or prompt is None:
            return
        no_dictionary = output is None or isinstance(output, tuple)
        cache = cache_in(kwargs if no_dictionary else output)
        if cache is not None and not is_short(cache):  # also after a failed call, which filled a part of it
            seal(cache, rows)
            if output is not None:
                self._caches[cache] = prompt
        if not no_dictionary and output.get("cross_attentions") is not None:
            output.cross_attentions = of_each(output.cross_attentions, prompt.of_rows(rows).scatter_keys)

    def _restore(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ran_encoder = kwargs.get("encoder_outputs") is None
        if self._prompt is not None and ran_encoder and not isinstance(output, tuple):
            full = PrunedStates.of(self._prompt.scatter(output.encoder_last_hidden_state), self._readers())
            output.encoder_last_hidden_state = full
            self._handed_out = weakref.ref(full)

    def _readers(self) -> Iterator[nn.Linear]:
        """Yield the decoder's layers that read encoder states: key and value projections of cross-attention."""
        for block in self.text_decoder.block:
            yield from (block.layer[1].EncDecAttention.k, block.layer[1].EncDecAttention.v)
