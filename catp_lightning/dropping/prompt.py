"""Prompts as they reach the language model, and what is left of them once visual tokens are dropped."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from catp_lightning.dropping.watching import ModelCall
from catp_lightning.errors import PruningError


@dataclass(frozen=True)
class Prompt:
    """Prompt from which visual tokens are chosen; B samples, before beams are expanded, T visual tokens of the largest.

    Attributes:
        tokens: bool [B, T], the visual tokens that each sample has, in the order of their placeholders.
        arguments: arguments of the model's own call: pixel values, sizes of images and the like.
        beams: number of rows that the model's own tensors have for each sample; they lie next to each other.
    """

    tokens: Tensor
    arguments: ModelCall
    beams: int


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
    """

    ids: Tensor
    visual: Tensor
    embeds: Tensor
    mask: Tensor
    positions: Tensor
    is_prompt: Tensor
    generating: bool = field(default=False, kw_only=True)

    @classmethod
    def of(
        cls,
        arguments: ModelCall,
        beams: int,
        ids: Tensor,
        visual: Tensor,
        embeds: Tensor,
        mask: Tensor,
        positions: Tensor,
        is_prompt: Tensor,
    ) -> "DecoderPrompt":
        """Return a prompt with the visual tokens whose placeholders are `visual`."""
        return cls(visual_tokens(visual), arguments, beams, ids, visual, embeds, mask, positions, is_prompt)

    def _refuse_end(self, columns: Tensor) -> None:
        """Raise PruningError if the last row of a prompt is dropped, as what is generated would follow nothing.

        Args:
            columns: bool [B, L], the columns that stay.
        """
        last = self.is_prompt.shape[1] - 1 - self.is_prompt.flip(1).long().argmax(1, keepdim=True)
        gone = ~columns.gather(1, last)[:, 0] & self.is_prompt.any(1)
        if bool(gone.any()):
            raise PruningError(
                f"The prompt of sample {int(gone.nonzero()[0])} ends in an image whose last token is dropped: "
                "an answer would be predicted from nothing. Put text after the image, as chat templates do."
            )

    def text_columns(self) -> tuple[Tensor, Tensor]:
        """Return the columns of the text rows that scorers read, int64 [B, R], and which of them exist, bool [B, R].

        R is the number of text rows of the largest sample. They are those after the first visual token, which can see
        it; all text rows if none is after it.
        """
        own = self.is_prompt & ~self.visual
        after = own & (self.visual.cumsum(1) > 0)
        own = after | (own & ~after.any(1, keepdim=True))
        most = int(own.sum(1).max())
        return (~own).long().argsort(dim=1, stable=True)[:, :most], own.long().sort(1, descending=True)[0][:, :most] > 0

    def text(self) -> tuple[Tensor, Tensor]:
        """Return the embeddings of the text rows that scorers read, float [B, R, D], and which exist, bool [B, R].

        The rows are those of `text_columns`; embeddings are zeros beyond a sample's own.
        """
        columns, valid = self.text_columns()
        embeds = self.embeds[:: self.beams].detach()
        return embeds.gather(1, columns[..., None].expand(-1, -1, embeds.shape[-1])) * valid[..., None], valid

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
        columns = own.repeat_interleave(self.beams, 0)
        if bool(columns.all()):
            return columns
        begun = (self.mask.cumsum(1) > 0)[:, 1:]
        return columns & torch.nn.functional.pad(begun, (0, 1), value=True)


@dataclass
class KeptSequence:
    """Columns of a prompt that stay after dropping; R rows, L original columns, n kept columns of the longest row.

    Attributes:
        order: int64 [R, n], original columns of the kept rows, ascending; rows that keep fewer have fillers among them.
        valid: bool [R, n], False for fillers.
        mask: int64 [R, L], the caller's mask of the full prompt.
        cache: weak reference to the cache that this prefill filled, if any.
    """

    order: Tensor
    valid: Tensor
    mask: Tensor
    cache: weakref.ref[Any] | None = None

    def gather(self, full: Tensor) -> Tensor:
        """Select the kept columns: [R, L] or [R, L, D] -> [R, n] or [R, n, D]."""
        index = self.order if full.dim() == 2 else self.order[..., None].expand(-1, -1, full.shape[-1])
        return full.gather(1, index)

    def gather_positions(self, positions: Tensor, compact: bool) -> Tensor:
        """Select position ids [..., R, L] -> [..., R, n]; `compact` closes the gaps that dropped columns leave."""
        short = positions.gather(-1, self.order.expand(*positions.shape[:-1], -1))
        if not compact:
            return short
        dropped_before = self.mask.cumsum(1).gather(1, self.order) - self.short_mask.cumsum(1)
        return (short - dropped_before).where(self.short_mask.bool(), short)  # padding keeps what it had

    def scatter(self, short: Tensor) -> Tensor:
        """Put values of kept columns back in their places: [R, n, D] -> [R, L, D], zeros where a row was dropped."""
        full = short.new_zeros(len(short), self.mask.shape[1], short.shape[-1])
        index = self.order[..., None].expand_as(short)
        return full.scatter(1, index, short.masked_fill(~self.valid[..., None], 0))  # a filler's may be NaN

    def scatter_keys(self, short: Tensor) -> Tensor:
        """Put attention to kept columns back in its places over all columns: [R, H, q, n + m] -> [R, H, q, L + m].

        The `m` last keys come after the prompt and stay as they are.

        Raises:
            PruningError: the attention has fewer keys than columns were kept, as with the cache of a sliding layer.
        """
        kept, later = self.order.shape[1], short.shape[3] - self.order.shape[1]
        if later < 0:
            raise PruningError(
                "Attention of a layer with a sliding window cannot be put back where columns were dropped. Leave "
                "output_attentions out, or ask for it without a cache."
            )
        prompt = short[..., :kept].transpose(1, 3).flatten(2)
        prompt = self.scatter(prompt).unflatten(2, (short.shape[2], short.shape[1])).transpose(1, 3)
        return torch.cat([prompt, short[..., kept:]], 3)

    def scatter_attention(self, short: Tensor) -> Tensor:
        """Put attention among kept columns back in its places: [R, H, n, n] -> [R, H, L, L].

        It is zero where the query or the key was dropped.
        """
        return self.scatter_keys(self.scatter_keys(short).transpose(2, 3)).transpose(2, 3)

    def scatter_states(self, short: Tensor) -> Tensor:
        """Put states [R, n, D] or attention maps [R, H, n, n] of a prefill back in their places over all columns."""
        return self.scatter(short) if short.dim() == 3 else self.scatter_attention(short)

    def scatter_step(self, short: Tensor) -> Tensor:
        """Put attention maps of a decoding step back in their places over all columns; leave its states as they are.

        A decoding step's own rows are all there: [R, q, D] of states, [R, H, q, n + m] of attention.
        """
        return short if short.dim() == 3 else self.scatter_keys(short)

    @property
    def short_mask(self) -> Tensor:
        return self.gather(self.mask) * self.valid

    @property
    def dropped(self) -> Tensor:
        """Number of columns that each row lost, without padding: int64 [R]."""
        return self.mask.sum(1) - self.short_mask.sum(1)

    @property
    def whole(self) -> bool:
        """True if nothing was dropped."""
        return self.order.shape[1] == self.mask.shape[1] and bool(self.valid.all())

    def of_rows(self, rows: Tensor) -> "KeptSequence":
        """Return the kept columns of the rows `rows`, int64 [R']: of beams, or of copies made after the prefill."""
        order, valid, mask = (part.index_select(0, rows) for part in (self.order, self.valid, self.mask))
        return KeptSequence(order, valid, mask, self.cache)


def visual_tokens(placeholders: Tensor) -> Tensor:
    """Return which visual tokens each sample has, bool [B, T], given its placeholders, bool [B, L]."""
    counts = placeholders.sum(1)
    return torch.arange(int(counts.max()), device=counts.device) < counts[:, None]


def columns_kept(placeholders: Tensor, keep: Tensor) -> Tensor:
    """Return the columns of a prompt that stay, bool [B, L]; text always stays.

    Args:
        placeholders: bool [B, L], columns of visual tokens.
        keep: bool [B, T], the visual tokens that stay.
    """
    columns, own = ~placeholders, visual_tokens(placeholders)
    columns[placeholders] = keep[:, : own.shape[1]][own]  # these samples may be of a batch with more tokens
    return columns


def kept_sequence(keep: Tensor, mask: Tensor) -> KeptSequence:
    """Return what is left of a prompt: `keep`, bool [R, L], under the attention mask `mask`, int64 [R, L]."""
    most = int(keep.sum(1).max())
    order = (~keep).long().argsort(dim=1, stable=True)[:, :most].sort(1).values
    return KeptSequence(order, keep.gather(1, order), mask)


def merged(rows: Tensor, visual: Tensor, carrier: Tensor) -> Tensor:
    """Return rows in which a visual token that carries others is the mean of all it carries, itself among them.

    Args:
        rows: float [R, L, D]; R is B samples times the beams, which lie next to each other.
        visual: bool [B, L], the visual tokens among them.
        carrier: int64 [B, T], for each visual token the one whose row carries it: itself, or one that stays; -1: none.
    """
    beams = len(rows) // len(visual)
    visual, carrier = visual.repeat_interleave(beams, 0), carrier.repeat_interleave(beams, 0)
    rows = rows.clone()
    rows[visual] = merged_features(rows[visual], visual_tokens(visual), carrier)
    return rows


def merged_features(flat: Tensor, tokens: Tensor, carrier: Tensor) -> Tensor:
    """Return features of visual tokens in which a token that carries others is the mean of all it carries.

    Args:
        flat: float [N, D], features of all N visual tokens, one after the other.
        tokens: bool [R, T], the visual tokens that each row has.
        carrier: int64 [R, T], for each visual token the one whose row carries it; -1: none.
    """
    values = flat.new_zeros(*tokens.shape, flat.shape[-1])
    values[tokens] = flat
    return group_means(values, carrier[:, : tokens.shape[1]].masked_fill(~tokens, -1))[tokens]


def group_means(values: Tensor, carrier: Tensor) -> Tensor:
    """Replace the token that carries a group by the group's mean; others stay as they were.

    Args:
        values: float [B, T, D].
        carrier: int64 [B, T], the token that carries each; -1: none.

    >>> group_means(torch.tensor([[[1.0], [4.0], [3.0], [9.0]]]), torch.tensor([[0, 1, 0, -1]]))[0, :, 0]
    tensor([2., 4., 3., 9.])
    """
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    joins = (carrier >= 0).to(wide.dtype)
    index = carrier.clamp(min=0)
    joining = wide.masked_fill(carrier[..., None] < 0, 0)  # a product with 0 would keep NaN and infinities
    total = torch.zeros_like(wide).scatter_add(1, index[..., None].expand_as(wide), joining)
    count = torch.zeros_like(joins).scatter_add(1, index, joins)
    leads = (carrier == torch.arange(carrier.shape[1], device=carrier.device)) & (count > 1)
    return torch.where(leads[..., None], total / count.clamp(min=1)[..., None], wide).to(values.dtype)


def of_each(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to the tensors of a model's output, or of a part of it; caches stay as they are."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple):
        return tuple(of_each(value, change) for value in output)
    if isinstance(output, ModelOutput):
        for name, value in output.items():
            output[name] = of_each(value, change)
    return output


@contextmanager
def forgetting(*forget: Callable[[], None]) -> Iterator[None]:
    """Call all of `forget` if the block raises: what was seen of a failed call must not serve another."""
    try:
        yield
    except BaseException:
        for each in forget:
            each()
        raise
