"""Prompts inside the decoder, or T5's encoder, at the stages where visual tokens are dropped."""

from dataclasses import dataclass

import torch
from torch import Tensor

from catp_lightning.errors import PruningError
from catp_lightning.methods.observation import Needs, Observation, Signal, Values
from catp_lightning.prompt.attention import attention_map
from catp_lightning.prompt.kept import KeptSequence, kept_sequence
from catp_lightning.prompt.merging import destinations, merge_groups
from catp_lightning.prompt.prompt import DecoderPrompt, columns_of_tokens
from catp_lightning.prompt.turns import all_of
from catp_lightning.utils.on_cpu import of_known, on_cpu, read_once
from catp_lightning.utils.rows import take_rows


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
        text_there: bool [B, R], the text rows of `text_columns` that exist.
        made: what scorers made of signals at earlier stages, as in `Observation.once`.
    """

    layer: int
    values: Values
    text_there: Tensor
    made: dict[str, Tensor]

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
        seen = Observation(self.tokens, layers, self.values, text=self.text_there, made=self.made)
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
        self._at: Tensor | None = None  # columns of visual tokens
        self.kept: list[KeptSequence] = []
        self.values: Values = {}
        self._text, self._made = prompt.text_columns(), dict[str, Tensor]()
        if Signal.IMAGE_EMBEDS in needs:
            self.values[Signal.IMAGE_EMBEDS] = self._visual(prompt.embeds)
        if Signal.TEXT_EMBEDS in needs:
            self.values[Signal.TEXT_EMBEDS] = prompt.text()[0]

    def at(self, stage: int, layer: int, hidden: Tensor) -> StagePrompt:
        """Return the prompt at a stage, whose rows `hidden`, [R, n, D], are about to enter layer `layer`."""
        values = dict(self.values)
        if Signal.HIDDEN_STATES in self.needs:
            values[Signal.HIDDEN_STATES] = self._visual(hidden)
        if Signal.TEXT_STATES in self.needs:
            columns, valid = self._text
            text = take_rows(hidden[:: self.prompt.rows_per_sample].detach(), self._places(columns))
            values[Signal.TEXT_STATES] = text * valid[..., None]
        own = {**vars(self.prompt), "tokens": self.tokens, "stage": stage}
        return StagePrompt(**own, layer=layer, values=values, text_there=self._text[1], made=self._made)

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
        beams, columns = self.prompt.rows_per_sample, self._columns()
        every = destinations(self.prompt.visual, columns, self._places(columns), destination)
        return merge_groups(hidden, every.gather(1, self.rows.order[::beams]).repeat_interleave(beams, 0))

    def look(self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Record the attention from the requested query rows of a layer to the visual tokens.

        It is an `attention.Reduction` over R rows, whose result is empty: the attention is stored in `values`.
        """
        if (Signal.LAST_TOKEN_ATTENTION, layer) not in self.values and Signal.LAST_TOKEN_ATTENTION in self.needs:
            self.values[Signal.LAST_TOKEN_ATTENTION, layer] = self.last_row(query, key, mask, scaling)
        if (Signal.TEXT_TO_IMAGE_ATTENTION, layer) not in self.values and Signal.TEXT_TO_IMAGE_ATTENTION in self.needs:
            columns, valid = self._text
            at = self._places(columns)
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
        columns = self._places(self._columns())[:, None, None].expand(*paid.shape[:3], -1)
        there = valid[:, None, :, None] & self.tokens[:, None, None]
        return paid.gather(3, columns).masked_fill(~there, 0.0)  # a row of padding sees nothing: it is NaN

    def _visual(self, rows: Tensor) -> Tensor:
        """Select visual tokens among the rows that are left, 0 for tokens that are not: [R, n, D] -> [B, T, D]."""
        found = take_rows(rows[:: self.prompt.rows_per_sample].detach(), self._places(self._columns()))
        return found.masked_fill_(~self.tokens[..., None], 0)

    def _places(self, columns: Tensor) -> Tensor:
        """Return the places of columns among the rows that are left, 0 for columns that are not: int64 [B, k]."""
        order = self.rows.order[:: self.prompt.rows_per_sample]
        place = torch.arange(order.shape[1], dtype=torch.int64, device=order.device).expand_as(order)
        return torch.zeros_like(self.prompt.ids).scatter(1, order, place).gather(1, columns)

    def _columns(self) -> Tensor:
        """Return the columns of visual tokens, 0 for tokens that a sample does not have: int64 [B, T]."""
        if self._at is None:
            self._at = columns_of_tokens(self.prompt.visual)
        return self._at
