"""Dropping of tokens inside the encoder of an encoder-decoder language model (T5): at the entry of some of its blocks.

Blocks before the first stage read the full prompt. From each stage on they get the mask of what is left and the bias
by relative position that those rows had in the full prompt. The decoder's cross-attention reads the rows that are left
at the end, as where tokens leave before the encoder. The first stage may be the encoder's input itself, where rows
leave as by `PruneAtEncoderInput`, and block 0 makes the bias of those that stayed.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from catp_lightning.models.base import Family
from catp_lightning.prompt.masks import on_both_axes
from catp_lightning.prompt.merging import merged
from catp_lightning.pruning.sites.base import Decide, Report, SiteSettings, ignored
from catp_lightning.pruning.sites.encoder_input import PruneAtEncoderInput
from catp_lightning.pruning.sites.stage_limits import layers_looked_at, refuse_stages
from catp_lightning.pruning.sites.stage_prompt import DecoderPrefill
from catp_lightning.utils.hooks import hooked


class PruneAtEncoderLayers(PruneAtEncoderInput):
    """Prune rows at the entry of some of an encoder's blocks; a prompt is decided on at each of these stages.

    Hidden states and attention maps of the encoder are zero where a row was dropped. Tokens may be merged.

    Raises:
        PruningError: none of the stages is a block after the first, or they do not ascend; or `compact` is True, though
            blocks before them have used the positions.
    """

    inside = True

    def __init__(self, family: Family, decide: Decide, settings: SiteSettings, report: Report = ignored) -> None:
        super().__init__(family, decide, settings, report)
        refuse_stages(family, settings)
        self.stages, self.needs = settings.stages, settings.needs
        self._looked_at = layers_looked_at(settings)
        self._reset()

    def _reset(self) -> None:
        self._prefill: DecoderPrefill | None = None  # the encoder's running call
        self._mask: Tensor | None = None  # mask of the running stage's blocks, once it is made

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        blocks = list(self.encoder.block)
        with ExitStack() as undo:
            undo.callback(self._reset)
            undo.enter_context(super()._hooked())
            for at in self._looked_at:
                undo.enter_context(hooked(blocks[at].layer[0].SelfAttention, after=partial(self._look, at)))
            first = next(at for at in self.stages if at)
            for at, block in enumerate(blocks[first:], first):
                undo.enter_context(hooked(block, partial(self._before, at)))
            undo.enter_context(hooked(self.encoder, after=self._leave, always=True))
            yield

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._reset()
        self._prompt = self._handed_out = None
        prompt = self._prompts.take(kwargs) if self.active else None
        if prompt is None or self.stages[0]:
            self._prefill = None if prompt is None else DecoderPrefill(prompt, self.needs)
            return None
        selection = self.decide(prompt)
        if selection.destination is not None:
            prompt = replace(prompt, embeds=merged(prompt.embeds, prompt.visual, selection.destination))
        self._prefill = DecoderPrefill(prompt, self.needs)
        short = self._prefill.narrow(selection.keep)
        if short.whole:
            return None
        self._prompt = short  # block 0 makes the bias of these rows
        return args, {**kwargs, "inputs_embeds": short.gather(prompt.embeds), "attention_mask": short.short_mask}

    def _look(self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Record the attention of a block, computed anew: not every version of transformers lets it be observed."""
        if self._prefill is None:  # text alone
            return
        bias, mask = output[1], kwargs["mask"]
        with torch.no_grad():
            query, key = (
                part(args[0]).unflatten(-1, (module.n_heads, -1)).transpose(1, 2) for part in (module.q, module.k)
            )
            self._prefill.look(layer, query, key, bias if mask is None else _with_mask(bias, mask), 1.0)

    def _before(self, at: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        prefill = self._prefill
        if prefill is None:
            return None
        given = {**dict(zip(self._block_names, args, strict=False)), **kwargs}
        hidden, bias, mask = given["hidden_states"], given["position_bias"], given.get("attention_mask")
        changes: dict[str, Any] = {}
        if at in self.stages:
            selection = self.decide(prefill.at(self.stages.index(at), at, hidden))
            if selection.destination is not None:
                hidden = prefill.merged(hidden, selection.destination)
            stays, before = prefill.narrow(selection.keep), mask if self._mask is None else self._mask
            if not prefill.rows.whole:  # each block hands its bias on to the next, but not its mask
                changes = {"hidden_states": stays.gather(hidden), "position_bias": on_both_axes(bias, stays)}
                if before is not None:
                    self._mask = on_both_axes(before.expand(-1, -1, hidden.shape[1], -1), stays)
        if prefill.rows.whole:
            return None
        if mask is not None:
            changes["attention_mask"] = self._mask
        names = zip(self._block_names, args, strict=False)
        return tuple(changes.pop(name, value) for name, value in names), {**kwargs, **changes}

    def _encoded(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Scatter the encoder's hidden states and attention maps of single blocks to full length.

        The last hidden state stays short, because the decoder reads it.
        """
        prefill = self._prefill
        if prefill is None or prefill.rows.whole:
            return output
        self._prompt = prefill.rows
        if isinstance(output, tuple):
            return (output[0], *map(self._restored, output[1:]))
        for name in ("hidden_states", "attentions"):
            if output.get(name) is not None:
                output[name] = self._restored(output[name])
        return output

    def _restored(self, values: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Return states or attention maps of each block at full length; None stays None."""
        return tuple(x if x is None else self._full(at, x) for at, x in enumerate(values))

    def _full(self, block: int, value: Tensor) -> Tensor:
        """Return states [R, n, D] that entered a block, before rows were dropped there, or its attention maps.

        States that left the last block count as the input of one more. Rows that leave at the encoder's input enter no
        block.
        """
        begun = (bisect_left if block and value.dim() == 3 else bisect_right)(self.stages, block)
        return value if self._prefill is None or not begun else self._prefill.kept[begun - 1].scatter_states(value)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._reset()


def _with_mask(bias: Tensor, mask: Tensor) -> Tensor:
    """Return a bias by relative position, [1 or R, H, Q, N], with a mask, boolean or additive, added to it."""
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
