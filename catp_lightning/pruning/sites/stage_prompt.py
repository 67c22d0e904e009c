"""Prompts inside the decoder, or T5's encoder, at the stages where visual tokens are dropped."""

from dataclasses import dataclass

import torch
from torch import Tensor

from catp_lightning.errors import PruningError
from catp_lightning.methods.observation import Needs, Observation, Signal, Values
from catp_lightning.prompt.attention import attention_map
from catp_lightning.prompt.kept import KeptSequence, kept_sequence
from catp_lightning.prompt.merging import merged
from catp_lightning.prompt.prompt import DecoderPrompt, visual_tokens
from catp_lightning.prompt.turns import all_of
from catp_lightning.utils.on_cpu import of_known, on_cpu, on_device, read_once


@dataclass(frozen=True)
class StagePrompt(DecoderPrompt):
    """Prompt at the entry of one decoder layer; all fields but `tokens` are as the prompt entered the decoder.

    Attributes:
        tokens: bool [B, T], the visual tokens that are still there; T counts those of the full prompt.
        layer: number of the layer that is about to run.
        values: signals that were asked for, float32 or float64 if they are attention; 0 for a token that was not there.
            `Signal.LAST_TOKEN_ATTENTION` is of the prompt's last real row that is still there. With labels it is the
            last row before the first label (the first row, if none is before it); what `generate` has generated does
            not count.
    """

    layer: int
    values: Values

    @property
    def counts(self) -> Tensor:
        return of_known(lambda visual: visual.sum(1), self.visual)

    @property
    def attention(self) -> Tensor | None:
        """Attention of the prompt's last row in the layer before, [B, H, T]; None if it was not asked for."""
        return self.values.get((Signal.LAST_TOKEN_ATTENTION, self.layer - 1))

    def observation(self) -> Observation:
        """Return the signals that scorers see: of the tokens that are still there, as one image per sample."""
        layers = {Signal.LAST_TOKEN_ATTENTION: self.layer, Signal.TEXT_TO_IMAGE_ATTENTION: self.layer}
        seen = Observation(self.tokens, layers, self.values, text=self.text_columns()[1])
        endings, tokens = on_cpu(self.endings, self.tokens)
        return seen.protecting(endings[tokens])


class DecoderPrefill:
    """State of a running prefill of a decoder, or call of an encoder; R is B samples times the beams.

    Attributes:
        prompt: the prompt as it entered the decoder.
        needs: signals to collect.
        cap: bound of the decoder's attention logits, as in `attention_map`.
        tokens: bool [B, T], the visual tokens that are still there.
        rows: columns of the prompt that are left.
        kept: columns that were left after each stage so far.
        values: signals that were seen so far, as in `StagePrompt`.
    """

    def __init__(self, prompt: DecoderPrompt, needs: Needs, cap: float | None = None) -> None:
        self.prompt, self.needs, self.cap, self.tokens = prompt, needs, cap, prompt.tokens
        self.rows = all_of(prompt.mask)
        self._at: Tensor | None = None  # places of visual tokens among all columns
        self.kept: list[KeptSequence] = []
        self.values: Values = {}
        if Signal.IMAGE_EMBEDS in needs:
            self.values[Signal.IMAGE_EMBEDS] = self._visual(prompt.embeds[:: prompt.rows_per_sample].detach())
        if Signal.TEXT_EMBEDS in needs:
            self.values[Signal.TEXT_EMBEDS] = prompt.text()[0]

    def at(self, stage: int, layer: int, hidden: Tensor) -> StagePrompt:
        """Return the prompt at a stage, whose rows `hidden`, [R, n, D], are about to enter layer `layer`."""
        values = dict(self.values)
        if not self.needs.keys().isdisjoint({Signal.HIDDEN_STATES, Signal.TEXT_STATES}):
            columns = self.rows.scatter(hidden.detach())[:: self.prompt.rows_per_sample]
        if Signal.HIDDEN_STATES in self.needs:
            values[Signal.HIDDEN_STATES] = self._visual(columns)
        if Signal.TEXT_STATES in self.needs:
            at, valid = self.prompt.text_columns()
            values[Signal.TEXT_STATES] = (
                columns.gather(1, at[..., None].expand(-1, -1, columns.shape[-1])) * valid[..., None]
            )
        return StagePrompt(**{**vars(self.prompt), "tokens": self.tokens, "stage": stage}, layer=layer, values=values)

    def narrow(self, keep: Tensor) -> KeptSequence:
        """Drop all visual tokens but `keep`, bool [B, T], and return what stays of the rows there were before.

        Raises:
            PruningError: no row of a sample is left.
        """
        self.tokens, before = of_known(torch.logical_and, read_once(keep), self.tokens), self.rows
        columns = of_known(lambda own, order: own.gather(1, order), self.prompt.columns(self.tokens), before.order)
        stays = kept_sequence(columns, before.short_mask)
        was, left = on_cpu(before.short_mask, stays.short_mask)
        emptied = was.any(1) & ~left.any(1)
        if bool(emptied.any()):
            raise PruningError(
                f"All tokens of sample {int(emptied.nonzero()[0]) // self.prompt.rows_per_sample} are visual and all "
                "of them leave: no row is left to answer from. Give the sample a prompt with text, or choose a scorer "
                "that keeps some."
            )
        order = of_known(lambda old, new: old.gather(1, new), before.order, stays.order)
        self.rows = KeptSequence(order, stays.valid, before.mask)
        self.kept.append(self.rows)
        return stays

    def merged(self, hidden: Tensor, destination: Tensor) -> Tensor:
        """Return the rows of a layer with tokens merged; called before rows are dropped.

        Args:
            hidden: float [R, n, D], the rows.
            destination: int64 [B, T], for each visual token the one that it is merged into; -1: none.
        """
        return self.rows.gather(merged(self.rows.scatter(hidden), self.prompt.visual, destination))

    def look(self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Record the attention from the requested query rows of a layer to the visual tokens.

        It is an `attention.Reduction` over R rows, whose result is empty: the attention is stored in `values`.
        """
        if (Signal.LAST_TOKEN_ATTENTION, layer) not in self.values and Signal.LAST_TOKEN_ATTENTION in self.needs:
            self.values[Signal.LAST_TOKEN_ATTENTION, layer] = self.last_row(query, key, mask, scaling)
        if (Signal.TEXT_TO_IMAGE_ATTENTION, layer) not in self.values and Signal.TEXT_TO_IMAGE_ATTENTION in self.needs:
            columns, valid = self.prompt.text_columns()
            order = self.rows.order[:: self.prompt.rows_per_sample]
            place = torch.arange(order.shape[1], device=order.device).expand_as(order)
            at = torch.zeros_like(self.prompt.ids).scatter(1, order, place).gather(1, columns)
            self.values[Signal.TEXT_TO_IMAGE_ATTENTION, layer] = self._paid(at, valid, query, key, mask, scaling)
        return query.new_empty(0)

    def last_row(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Return the attention that the row which predicts the answer pays to the visual tokens: [B, H, T]."""
        order, real = (part[:: self.prompt.rows_per_sample] for part in (self.rows.order, self.rows.short_mask))
        is_prompt = self.prompt.is_prompt.gather(1, order) & self.rows.valid[:: self.prompt.rows_per_sample]
        last = is_prompt.shape[1] - 1 - is_prompt.flip(1).long().argmax(1)
        at = last.where(is_prompt.any(1), real.argmax(1))[:, None]
        return self._paid(at, torch.ones_like(at, dtype=torch.bool), query, key, mask, scaling)[:, :, 0]

    def _paid(
        self, at: Tensor, valid: Tensor, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """Return the attention that chosen rows of each sample pay to the visual tokens: [B, H, r, T].

        Args:
            at: int64 [B, r], places of the rows among those that are left.
            valid: bool [B, r], False for rows that do not exist: their attention is 0.
            query, key, mask, scaling: as of an `attention.Reduction`.
        """
        beams, heads, few = self.prompt.rows_per_sample, key.shape[1], at.shape[1]
        order = self.rows.order[::beams]
        each = torch.arange(len(at), device=at.device)[:, None]
        if mask is not None and mask.dim() == 4:
            seen = mask.expand(len(query), -1, -1, -1)[::beams].transpose(1, 2)[each, at].transpose(1, 2)
        else:  # the mask of flash attention, or none
            causal = torch.arange(order.shape[1], device=at.device) <= at[..., None]
            seen = (causal if mask is None else causal & mask[::beams, None].bool())[:, None]
        rows = query[::beams].transpose(1, 2)[each, at].transpose(1, 2)
        shared = rows.unflatten(1, (heads, -1))  # query heads that share a key head become its rows
        seen = seen.expand(-1, heads, -1, -1)[:, :, None].expand(-1, -1, shared.shape[2], -1, -1).flatten(2, 3)
        paid = (
            attention_map(shared.flatten(2, 3), key[::beams], seen, scaling, self.cap)
            .unflatten(2, (shared.shape[2], few))
            .flatten(1, 2)
        )
        columns = paid.new_zeros(*paid.shape[:3], self.prompt.mask.shape[1])
        columns = columns.scatter(3, order[:, None, None].expand_as(paid), paid)
        columns = columns.masked_fill(~valid[:, None, :, None], 0.0)  # a row of padding sees nothing: it is NaN
        return self._visual(columns.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def _visual(self, columns: Tensor) -> Tensor:
        """Select the values of visual tokens among those of the prompt's columns: [B, L, ...] -> [B, T, ...]."""
        tokens, visual = visual_tokens(self.prompt.visual), self.prompt.visual
        if self._at is None:
            own, there = on_cpu(visual, tokens)
            at = torch.zeros(there.shape, dtype=torch.int64, device="cpu")
            at[there] = own.nonzero()[:, 1]
            self._at = on_device(at, visual.device)
        shape = (*tokens.shape, *columns.shape[2:])
        at, there = (part.view(*tokens.shape, *[1] * (columns.dim() - 2)) for part in (self._at, tokens))
        return columns.gather(1, at.expand(shape)).masked_fill(~there, 0)
