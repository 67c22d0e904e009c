"""Sizes of prompts, which their prices are made of."""

from dataclasses import dataclass

import torch
from torch import Tensor

from catp_lightning.prompt.prompt import CrossAttended, DecoderPrompt


@dataclass(frozen=True)
class Prompts:
    """Sizes of N prompts, each without padding; int64 [N] each.

    Attributes:
        text: rows that are no visual tokens.
        tokens: visual tokens before any left.
        image_rows: in Llama-3.2-Vision all image rows, `tokens` of which some text sees, and others of empty tiles.
        blind: in Llama-3.2-Vision the rows of `text` that see no image: those attend to all image rows.
    """

    text: Tensor
    tokens: Tensor
    image_rows: Tensor
    blind: Tensor

    @classmethod
    def of(
        cls, text: Tensor, tokens: Tensor, image_rows: Tensor | None = None, blind: Tensor | None = None
    ) -> "Prompts":
        """Return prompts; `image_rows` is `tokens` and `blind` is 0 if left out."""
        rows = tokens if image_rows is None else image_rows
        return cls(text, tokens, rows, torch.zeros_like(text) if blind is None else blind)

    @classmethod
    def read(cls, prompt: DecoderPrompt | CrossAttended) -> "Prompts":
        """Return the sizes of the prompts of one call, one for each sample; columns of an answer count as text."""
        tokens, beams = prompt.counts, prompt.rows_per_sample
        if isinstance(prompt, DecoderPrompt):
            return cls.of(prompt.mask[::beams].sum(1) - tokens, tokens)
        mask = prompt.text_arguments.get("attention_mask")
        text = torch.full_like(tokens, prompt.is_prompt.shape[1]) if mask is None else mask[::beams].sum(1)
        return cls.of(text, tokens, torch.full_like(tokens, prompt.tokens.shape[1]), text - prompt.is_prompt.sum(1))
