"""Prompts as they reach the language model, and what is left of them once visual tokens are dropped."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from catp_lightning.errors import PruningError
from catp_lightning.methods.observation import Observation
from catp_lightning.prompt.call import ModelCall
from catp_lightning.prompt.masks import Masks
from catp_lightning.utils.on_cpu import of_known, on_cpu, on_device, taken
from catp_lightning.utils.rows import take_rows


@dataclass(frozen=True)
class Prompt:
    """Prompt from which visual tokens are chosen; B samples, before beams are expanded, T visual tokens of the largest.

    Attributes:
        tokens: bool [B, T], the visual tokens that each sample has, in the order of their placeholders.
        arguments: arguments of the model's own call: pixel values, sizes of images and the like.
        rows_per_sample: number of rows that the model's own tensors have for each sample; they lie next to each other.
        stage: number of the stage at which it is decided on, 0 for the first.
    """

    tokens: Tensor
    arguments: ModelCall
    rows_per_sample: int
    stage: int = field(default=0, kw_only=True)

    @property
    def counts(self) -> Tensor:
        """Number of visual tokens of each sample before any was dropped: int64 [B]."""
        return of_known(lambda tokens: tokens.sum(1), self.tokens)

    @property
    def text_rows(self) -> Tensor | None:
        """Number of rows of each sample that are no visual tokens, without padding: int64 [B]; None: not counted."""
        return None

    def observation(self) -> Observation | None:
        """Return the signals that were observed inside the language model; None if it was not entered yet."""
        return None


@dataclass(frozen=True)
class DecoderPrompt(Prompt):
    """Prompt at the entry of the decoder, or of the encoder that reads it; R is B samples times the beams, L columns.

    Attributes:
        ids: int64 [B, L], token ids.
        visual: bool [B, L], True for placeholders of visual tokens.
        embeds: float [R, L, D], input embeddings.
        mask: int64 [R, L], attention mask.
        positions: int64 [R, L], or [3 or 4, R, L] where an image's rows have coordinates.
        is_prompt: bool [B, L], True for rows of the prompt itself: neither padding, nor from the first label on, nor
            generated.
        generating: True if `generate` predicts an answer from the prompt's last row.
        masks: masks [1 or R, h, L, L] that the model itself made of the prompt, where it does not leave that to the
            decoder; by type of layer, where types differ. None: `mask` says all.
        by_column: other inputs of the decoder by name, [R, L, ...].
        deepstack: features that are added to visual rows after the first layers, a tensor [visual rows, D] for each, in
            the order of placeholders; empty: none are.
    """

    ids: Tensor
    visual: Tensor
    embeds: Tensor
    mask: Tensor
    positions: Tensor
    is_prompt: Tensor
    generating: bool = field(default=False, kw_only=True)
    masks: Masks | None = field(default=None, kw_only=True)
    by_column: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    deepstack: tuple[Tensor, ...] = field(default=(), kw_only=True)

    @classmethod
    def of(
        cls,
        arguments: ModelCall,
        rows_per_sample: int,
        ids: Tensor,
        visual: Tensor,
        embeds: Tensor,
        mask: Tensor,
        positions: Tensor,
        is_prompt: Tensor,
    ) -> "DecoderPrompt":
        """Return a prompt with the visual tokens whose placeholders are `visual`."""
        return cls(visual_tokens(visual), arguments, rows_per_sample, ids, visual, embeds, mask, positions, is_prompt)

    @property
    def text_rows(self) -> Tensor:
        return (self.mask[:: self.rows_per_sample].bool() & ~self.visual).sum(1)

    @property
    def endings(self) -> Tensor:
        """True for a visual token that is the last row of its prompt and predicts the answer: bool [B, T]."""
        visual, tokens, is_prompt = on_cpu(self.visual, visual_tokens(self.visual), self.is_prompt)
        columns = torch.zeros_like(visual).scatter(1, last_rows(is_prompt), is_prompt.any(1, keepdim=True))
        found = torch.zeros(self.tokens.shape, dtype=torch.bool, device="cpu")
        found[tokens] = columns[visual]
        return on_device(found, self.visual.device)

    def _refuse_end(self, columns: Tensor) -> None:
        """Raise PruningError if the last row of a prompt is dropped, as what is generated would follow nothing.

        Args:
            columns: bool [B, L], the columns that stay.
        """
        own, is_prompt = on_cpu(columns, self.is_prompt)
        gone = ~own.gather(1, last_rows(is_prompt))[:, 0] & is_prompt.any(1)
        if bool(gone.any()):
            raise PruningError(
                f"The prompt of sample {int(gone.nonzero()[0])} ends in an image whose last token is dropped: "
                "an answer would be predicted from nothing. Choose that token too, or put text after the image."
            )

    def text_columns(self) -> tuple[Tensor, Tensor]:
        """Return the columns of the text rows that scorers read, int64 [B, R], and which of them exist, bool [B, R].

        R is the number of text rows of the largest sample. They are those after the first visual token, which can see
        it; all text rows if none is after it.
        """
        is_prompt, visual = on_cpu(self.is_prompt, self.visual)
        own = is_prompt & ~visual
        after = own & (visual.cumsum(1) > 0)
        own = after | (own & ~after.any(1, keepdim=True))
        count, device = int(own.sum(1).max()), self.visual.device
        columns = (~own).long().argsort(dim=1, stable=True)[:, :count]
        return on_device(columns, device), on_device(own.gather(1, columns), device)

    def text(self) -> tuple[Tensor, Tensor]:
        """Return the embeddings of the text rows that scorers read, float [B, R, D], and which exist, bool [B, R].

        The rows are those of `text_columns`; embeddings are zeros beyond a sample's own.
        """
        columns, valid = self.text_columns()
        embeds = self.embeds[:: self.rows_per_sample].detach()
        return take_rows(embeds, columns) * valid[..., None], valid

    def of_tokens(self, values: Tensor) -> Tensor:
        """Select the values of all visual tokens, one after the other: [B, L, ...] -> [N, ...]."""
        return taken(values, self.visual)

    def question(self) -> Tensor:
        """Return the mean of the text rows that `text` gives: float [B, D], in float32 at least; 0 without text."""
        rows, valid = self.text()
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return wide.sum(1) / valid.sum(1, keepdim=True).clamp(min=1)

    def columns(self, keep: Tensor) -> Tensor:
        """Return the columns that stay, bool [R, L], given the visual tokens that stay, bool [B, T]; text always stays.

        Where a token is dropped, padding on the left is dropped too, or the longest prompt would decide for all. The
        last column of the padding stays: a label may be predicted from it.

        Raises:
            PruningError: the row that an answer is generated from would be dropped.
        """
        own = columns_kept(self.visual, keep)
        if self.generating:
            self._refuse_end(own)
        columns, mask = on_cpu(own, self.mask)
        columns = columns.repeat_interleave(self.rows_per_sample, 0)
        if not bool(columns.all()):
            columns = columns & torch.nn.functional.pad((mask.cumsum(1) > 0)[:, 1:], (0, 1), value=True)
        return on_device(columns, self.mask.device)


def last_rows(is_prompt: Tensor) -> Tensor:
    """Return the column of the last row of each prompt, bool [B, L] -> int64 [B, 1]; the last one where none is."""
    return is_prompt.shape[1] - 1 - is_prompt.flip(1).long().argmax(1, keepdim=True)


def visual_tokens(placeholders: Tensor) -> Tensor:
    """Return which visual tokens each sample has, bool [B, T], given its placeholders, bool [B, L]."""
    counts = on_cpu(placeholders)[0].sum(1)
    return on_device(torch.arange(int(counts.max()), device="cpu") < counts[:, None], placeholders.device)


def columns_of_tokens(placeholders: Tensor) -> Tensor:
    """Return the column of each visual token, int64 [B, T], 0 for tokens that a sample does not have: bool [B, L]."""
    own, there = on_cpu(placeholders, visual_tokens(placeholders))
    at = torch.zeros(there.shape, dtype=torch.int64, device="cpu")
    at[there] = own.nonzero()[:, 1]
    return on_device(at, placeholders.device)


def columns_kept(placeholders: Tensor, keep: Tensor) -> Tensor:
    """Return the columns of a prompt that stay, bool [B, L]; text always stays.

    Args:
        placeholders: bool [B, L], columns of visual tokens.
        keep: bool [B, T], the visual tokens that stay.
    """
    visual, own, stay = on_cpu(placeholders, visual_tokens(placeholders), keep)
    columns = ~visual
    columns[visual] = stay[:, : own.shape[1]][own]  # these samples may be of a batch with more tokens
    return on_device(columns, placeholders.device)


@dataclass(frozen=True)
class CrossAttended(Prompt):
    """Prompt after its first cross-attention layer.

    B samples, H heads, D features; T is images x tiles x rows of a tile, as in the unpruned model.

    Attributes:
        tokens: bool [B, T], True for the image rows that text sees.
        arguments: arguments of the model's call, by name; its tensors have B x beams rows.
        states: float [B, T, D], the model's cross_attention_states.
        attention: float32 or float64 [B, H, T], attention that each head of the first cross-attention layer pays to
            each image row, summed over the prompt's text rows that see an image; 0 where `tokens` is False. Text from
            the first label on does not belong to the prompt; if only such text sees an image, its first row counts.
            None if the attention was not asked for.
        is_prompt: bool [B, L], the text rows of the prompt that see an image, without its answer.
        text_arguments: arguments of the text model's call, by name, without its cache.
    """

    states: Tensor
    attention: Tensor | None
    is_prompt: Tensor
    text_arguments: Mapping[str, Any]
