"""SparseVLM: attention inside the decoder from the text rows that are relevant to the image (2410.04417, section 3)."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from catp_lightning.methods.budget import keep_count
from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.scorers.base import AttentionScorer
from catp_lightning.utils.on_cpu import on_cpu, on_device_of

DEPTH, LAYERS = 32, (2, 6, 15)
TOKENS, LISTS = 576, ((66, 30, 17), (303, 110, 36), (300, 200, 110))
"""Number of LLaVA-1.5-7B's 576 visual tokens that stay after each layer of `LAYERS`, for each budget of the paper."""


@dataclass(frozen=True)
class SparseVLM(AttentionScorer):
    """Mean attention that a visual token gets from the raters, relevant text rows, in the layer before each stage.

    Raters are the text rows more relevant to the image than the average text row, chosen once from what the language
    model reads: relevance is the softmax over text rows of a visual token's dot products with them, averaged over the
    visual tokens. Where all text rows are equally relevant, all are raters. The budget counts the tokens of a sample
    that are left after the last stage, those that recycled tokens are merged into included. The authors' code scores in
    layers 2, 6 and 15 of 32 and drops after them (`stages_at=[3, 7, 16]`), and adds recycled tokens to its budgets.

    `schedule="budget"` keeps the numbers of the paper's lists at its budgets of 110, 36 and 17 of 576 tokens. For other
    budgets the logarithms of the shares are interpolated (extrapolated in proportion below the least budget), and for
    another number of stages than three they are interpolated between stages too. `schedule="rank"` drops
    `scale` * (tokens - rank) tokens at each stage, where rank is the matrix rank of the raters' attention
    [raters, tokens], averaged over heads. It never goes below the budget, but may end above it.

    Attributes:
        layers: decoder layers whose attention is read, counted from 0, or from -1 for the one before each stage.
        schedule: rule for the number of tokens that stay after each stage, "budget" or "rank".
        scale: factor of the rank schedule, above 0; 1 keeps as many tokens as the rank.
        stages_at: the decoder layers at whose entry tokens are dropped; None: layers 2, 6 and 15 of 32, in proportion.
    """

    selector = "recycle"

    layers: tuple[int, ...] | None = (-1,)
    schedule: Literal["budget", "rank"] = "budget"
    scale: float = 1.0
    stages_at: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale <= 0:
            raise ValueError(f"scale is {self.scale}; a share of the tokens beyond the rank is dropped: above 0.")

    @property
    def needs(self) -> Needs:
        return {Signal.TEXT_TO_IMAGE_ATTENTION: self.layers, Signal.TEXT_EMBEDS: None, Signal.IMAGE_EMBEDS: None}

    @property
    def adaptive(self) -> bool:
        return self.schedule == "rank"

    def stages(self, depth: int) -> tuple[int, ...]:
        if self.stages_at is not None:
            return self.stages_at
        return tuple(sorted({max(1, round(depth * layer / DEPTH)) for layer in LAYERS}))

    def stage_counts(self, keep: int | float, tokens: Tensor, stage: int, stages: int, seen: Observation) -> Tensor:
        if self.schedule == "budget":
            counts = [_scheduled(keep, count, (stage + 1) / stages) for count in on_cpu(tokens)[0].tolist()]
            return on_device_of(tokens, counts)
        sizes, valid = on_cpu(tokens, seen.valid)
        left = valid.sum(1).tolist()
        ranks = self._ranks(seen).tolist()
        dropped = [math.floor(min(self.scale * (own - n) + 1e-9, own)) for n, own in zip(ranks, left, strict=True)]
        least = [keep_count(keep, count) for count in sizes.tolist()]
        counts = [max(own - n, few) for own, n, few in zip(left, dropped, least, strict=True)]
        return on_device_of(tokens, counts)

    def head_scores(self, seen: Observation) -> Tensor:
        paid, count = self._rated(seen)
        return paid.sum(3) / count.clamp(min=1)[:, None, None, None]

    def _rated(self, seen: Observation) -> tuple[Tensor, Tensor]:
        """Attention from the raters to the tokens that are left, and the number of raters.

        Returns:
            float [I, L, H, R, T], R text rows, 0 where a row is not a rater or a token is not there; and int64 [I].
        """
        text = seen.text
        assert text is not None  # observed with the rows themselves
        chosen = seen.once("raters", lambda: raters(seen[Signal.IMAGE_EMBEDS], seen[Signal.TEXT_EMBEDS], text))
        rated = chosen[:, None, None, :, None] & seen.valid[:, None, None, None]
        return seen.by_layer(Signal.TEXT_TO_IMAGE_ATTENTION, self.layers).masked_fill(~rated, 0.0), chosen.sum(1)

    def _ranks(self, seen: Observation) -> Tensor:
        """Matrix rank of each sample's attention [raters, tokens], averaged over layers and heads: int64 [I], CPU."""
        paid, count = self._rated(seen)
        if not paid.shape[3]:  # prompts without text
            return torch.zeros(len(count), dtype=torch.int64, device="cpu")
        rated = paid.mean((1, 2)).nan_to_num().to(torch.promote_types(paid.dtype, torch.float32))
        read = torch.cat([rated.flatten(1), count[:, None].to(rated)], 1).cpu().double()  # not every device has double
        values = torch.linalg.svdvals(read[:, :-1].view(rated.shape))  # padding adds singular values of zero
        larger = read[:, -1].maximum(on_cpu(seen.valid)[0].sum(1).double())
        least = values.amax(1) * larger * torch.finfo(paid.dtype).eps
        return (values > least[:, None]).sum(1)


def raters(read: Tensor, text: Tensor, valid: Tensor) -> Tensor:
    """Mask of the text rows that are more relevant to the visual tokens than the average text row.

    Args:
        read: float [B, T, D], visual tokens as the language model reads them, zeros where a sample has no token.
        text: float [B, R, D], text rows as the language model reads them.
        valid: bool [B, R], True where a sample has a text row.

    Returns:
        bool [B, R]; True for all text rows of a sample if none exceeds the average by more than rounding.
    """
    dtype = torch.promote_types(read.dtype, torch.float32)
    with torch.autocast(read.device.type, enabled=False):
        products = read.to(dtype) @ text.to(dtype).transpose(1, 2)
    shares = products.masked_fill(~valid[:, None], -torch.inf).softmax(-1).nan_to_num()  # NaN: a sample without text
    own = read.ne(0).any(-1)
    relevance = (shares * own[..., None]).sum(1) / own.sum(1, keepdim=True).clamp(min=1)
    above = valid & (relevance * valid.sum(1, keepdim=True) > 1 + 1e-5)  # a softmax over R rows: their average is 1 / R
    return above | (valid & ~above.any(1, keepdim=True))


def _scheduled(keep: int | float, tokens: int, part: float) -> int:
    """Number of `tokens` that stay after a share `part` of the stages under `schedule="budget"`."""
    last = keep_count(keep, tokens) / max(1, tokens)
    if last in (0, 1):
        return tokens
    budgets = np.log([*(counts[-1] / TOKENS for counts in LISTS), 1])
    at, listed = np.log(last), max(np.log(last), budgets[0])
    early = [np.interp(listed, budgets, np.log([*(c[n] / TOKENS for c in LISTS), 1])) for n in (0, 1)]
    logs = [0, *(value * at / listed for value in early), at]
    return keep_count(float(np.exp(np.interp(part * 3, range(4), logs))), tokens)
