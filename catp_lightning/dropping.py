"""How a token is dropped: rows leave at the entry of the text decoder, and its output is handed back at full length.

Outer code (labels, `logits[:, -1]`, generate, beams) never notices. Position ids stay those of the full prompt.
During cached decoding the mask is rebuilt from the original column of every cached key.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from catp_lightning.errors import PruningError
from catp_lightning.families import Family


@dataclass(frozen=True)
class Prompt:
    """A prompt at the entry of the decoder; R is B times the beams, the rows of a sample next to each other.

    Attributes:
        ids: int64 [B, L].
        visual: bool [B, L], the placeholders among them.
        embeds: float [R, L, D].
        mask: int64 [R, L].
        positions: int64 [R, L].
    """

    ids: Tensor
    visual: Tensor
    embeds: Tensor
    mask: Tensor
    positions: Tensor


@dataclass
class Shortened:
    """A prefill after dropping.

    Attributes:
        order: int64 [B, n], original columns of the rows that stayed, ascending; rows that keep fewer are filled up.
        valid: bool [B, n], False for fillers.
        mask: int64 [B, L], the caller's mask of the full prompt.
        cache: the cache this prefill filled, if any.
    """

    order: Tensor
    valid: Tensor
    mask: Tensor
    cache: weakref.ref[Any] | None = None

    def shorten(self, full: Tensor) -> Tensor:
        """[B, L] or [B, L, D] -> [B, n] or [B, n, D]."""
        index = self.order if full.dim() == 2 else self.order[..., None].expand(-1, -1, full.shape[-1])
        return full.gather(1, index)

    def restore(self, short: Tensor) -> Tensor:
        """[B, n, D] -> [B, L, D], zeros where a row was dropped."""
        full = short.new_zeros(len(short), self.mask.shape[1], short.shape[-1])
        index = self.order[..., None].expand_as(short)
        return full.scatter(1, index, short * self.valid[..., None])

    @property
    def short_mask(self) -> Tensor:
        return self.shorten(self.mask) * self.valid


def shortened(keep: Tensor, mask: Tensor) -> Shortened:
    """What is left of a prompt: keep bool [B, L], mask int64 [B, L]."""
    most = int(keep.sum(1).max())
    order = (~keep).long().argsort(dim=1, stable=True)[:, :most].sort(1).values
    return Shortened(order, keep.gather(1, order), mask)


class DecoderEntry:
    """Drops rows at the entry of one model's decoder.

    Args:
        family: knows the model's parts.
        choose: from a prompt, which of its columns stay, bool [B, L]; text always does.
        compact: number the kept rows anew instead of leaving them their position ids.
        forget: called when a prompt is refused: what was observed for it must not serve another.
    """

    def __init__(
        self,
        family: Family,
        choose: Callable[[Prompt], Tensor],
        compact: bool = False,
        forget: Callable[[], None] = lambda: None,
    ) -> None:
        self.family, self.choose, self.compact, self.forget = family, choose, compact, forget
        self.parameters = list(inspect.signature(family.decoder.forward).parameters)
        self.active = True
        self.labels_left_out = 0
        self._ids: Tensor | None = None
        self._labels: Tensor | None = None
        self._inside = False
        self._prompt: Shortened | None = None  # of the prefill that later decoding steps belong to
        self._now: Shortened | None = None  # of the prefill that is running

    @contextmanager
    def dropping(self) -> Iterator[None]:
        """Hooks are in place only while inside."""
        model, decoder = self.family.model, self.family.decoder
        with ExitStack() as undo:
            for handle in (
                model.get_input_embeddings().register_forward_pre_hook(self._see_ids),
                model.register_forward_pre_hook(self._see_labels, with_kwargs=True),
                decoder.register_forward_pre_hook(self._enter, with_kwargs=True),
                decoder.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
            ):
                undo.callback(handle.remove)
            yield

    def _see_ids(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # The one place that sees the prompt's ids in forward and in BLIP-2's generate, which never calls forward.
        if self.active and not self._inside and args and args[0].dim() == 2:
            self._ids = args[0]

    def _see_labels(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._labels = None
        if not self.active or kwargs.get("labels") is None:
            return None
        self._labels = kwargs["labels"].clone()  # changed in place once it is known which rows go
        return args, {**kwargs, "labels": self._labels}

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.active:
            return None
        try:
            return (), self._changed({**dict(zip(self.parameters, args, strict=False)), **kwargs})
        except BaseException:
            self.forget()
            raise

    def _changed(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        cache = kwargs.get("past_key_values")
        if getattr(cache, "is_compileable", False):
            raise PruningError(
                "A static cache cannot be pruned: its length is fixed. Leave cache_implementation at its default."
            )
        self._inside, self._now = True, None
        past = 0 if cache is None else cache.get_seq_length()
        return self._prefill(kwargs) if past == 0 else self._decode(kwargs, past)

    def _prefill(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        self._prompt, ids, self._ids = None, self._ids, None
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:  # the language model used by itself, on text
            return kwargs
        batch, length = embeds.shape[:2]
        if ids is None or ids.shape[1] != length or batch % len(ids):
            raise PruningError(
                "The prompt reached the language model without its token ids, so its visual tokens cannot be found. "
                "Pass input_ids (and pixel_values), not inputs_embeds; chunked prefill and assisted decoding cannot be "
                "pruned."
            )
        ids = ids.to(embeds.device)
        visual = ids == self.family.image_token_id
        mask = _two_dimensional(kwargs.get("attention_mask"), batch, length, embeds.device)
        positions = kwargs.get("position_ids")
        positions = self.family.positions(mask) if positions is None else positions.to(mask.device).expand(batch, -1)
        keep = self.choose(Prompt(ids, visual, embeds, mask, positions))
        keep = keep.repeat_interleave(batch // len(ids), 0)  # beams follow their sample
        prompt = shortened(keep, mask)
        if prompt.order.shape[1] == length and bool(prompt.valid.all()):
            return kwargs
        self._prompt = self._now = prompt
        self._leave_out_labels(keep)
        return {
            **kwargs,
            "inputs_embeds": prompt.shorten(embeds),
            # Never None: gaps in position ids would be read as several packed sequences.
            "attention_mask": prompt.short_mask,
            "position_ids": self.family.positions(prompt.short_mask) if self.compact else prompt.shorten(positions),
        }

    def _decode(self, kwargs: dict[str, Any], past: int) -> dict[str, Any]:
        prompt = self._prompt
        if prompt is None:  # its prefill was not shortened
            return kwargs
        rows = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        batch, new = rows.shape[:2]
        kept, length = prompt.order.shape[1], prompt.mask.shape[1]
        mask = _two_dimensional(kwargs.get("attention_mask"), batch, length + past - kept + new, rows.device)
        own = prompt.cache() if prompt.cache is not None else None
        if own is not kwargs["past_key_values"] or batch % len(prompt.order):
            raise PruningError(
                "This cache was not filled by the last pruned prompt, or was changed since: it cannot be decoded from. "
                "Generate from the prompt again, and without assisted or prompt-lookup decoding."
            )
        short = prompt.short_mask.repeat_interleave(batch // len(prompt.order), 0)
        short = torch.cat([short, mask[:, length:]], 1)
        positions = kwargs.get("position_ids")
        if self.compact:
            positions = self.family.positions(short)[:, -new:]
        elif positions is None:
            positions = self.family.positions(mask)[:, -new:]
        return {**kwargs, "attention_mask": short, "position_ids": positions}

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self._inside = False
        prompt, self._now = self._now, None
        if prompt is None or output is None:
            return output
        if isinstance(output, tuple):
            cache = kwargs.get("past_key_values")
            output = (prompt.restore(output[0]), *output[1:])
        else:
            cache = output.get("past_key_values")
            output.last_hidden_state = prompt.restore(output.last_hidden_state)
        prompt.cache = None if cache is None else weakref.ref(cache)
        return output

    def _leave_out_labels(self, keep: Tensor) -> None:
        """A label is predicted from the row before it; where that row is gone there is nothing to compare."""
        if self._labels is None:
            return
        predicted_from_dropped = ~keep[:, -self._labels.shape[1] :][:, :-1].to(self._labels.device)
        later = self._labels[:, 1:]
        self.labels_left_out = int((predicted_from_dropped & (later != -100)).sum())
        later[predicted_from_dropped] = -100


def _two_dimensional(mask: Any, batch: int, length: int, device: torch.device) -> Tensor:
    if mask is None:  # generate leaves out an all-ones mask
        return torch.ones(batch, length, dtype=torch.long, device=device)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] != length:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise PruningError(
            f"attention_mask is {shape}; a prompt can be pruned under a mask of shape [batch, length], here "
            f"[{batch}, {length}]."
        )
    return mask.to(device).long()
