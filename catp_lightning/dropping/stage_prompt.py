"""A prompt inside the decoder, at the stages where its rows leave."""

from dataclasses import dataclass

import torch
from torch import Tensor

from catp_lightning.attention import attention_map
from catp_lightning.dropping.prompt import DecoderPrompt, Shortened, shortened, visual_tokens
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
