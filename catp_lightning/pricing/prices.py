"""What prompts cost a model: visual tokens, FLOPs of the prefill and bytes of the cache, by arithmetic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from catp_lightning.errors import PruningError
from catp_lightning.models import Family
from catp_lightning.models.base import Reads
from catp_lightning.pricing.layers import Stored, Work, layers_of, stored_by, work_of
from catp_lightning.pricing.prompts import Prompts

Unit = Literal["tokens", "tokens_per_layer", "prefill_flops", "cache_bytes"]
COUNTED: tuple[Unit, ...] = get_args(Unit)
"""Units that are counted by arithmetic; seconds of the prefill are measured, by `PrefillProfile`."""


@dataclass(frozen=True)
class Prices:
    """Prices of prompts for one model, each for a sample alone, without padding and beams.

    - `tokens`: visual tokens that stay after the last stage.
    - `tokens_per_layer`: visual tokens that a layer of the language model reads, the mean over its layers.
    - `prefill_flops`: FLOPs of the layers that read the prompt, as `torch.utils.flop_counter.FlopCounterMode` counts
      them: matrix products, and attention of all rows to all rows, whatever is masked. They are the decoder's layers;
      where an encoder reads visual tokens (T5), its blocks, and the decoder's attention to them for one row of an
      answer. What pruning cannot change is left out: the vision part, rotary angles, and the head, which makes logits
      of the last row. So is what choosing costs, scores and selection: `PrefillProfile` measures it, in seconds.
    - `cache_bytes`: bytes of the keys and values that the cache holds after the prefill; where an encoder reads visual
      tokens, after one row of an answer.

    `visual`, int64 [N, depth], says how many visual tokens each layer reads; None: the model is not pruned. In
    Llama-3.2-Vision the first layer that attends to the image reads all of them, whatever `visual` says, and what the
    last one reads stays in the cache, which is exact where the last row of text sees all images.

    Attributes:
        reads: part of the language model that reads visual tokens, as `Family.reads`.
        depth: number of layers that `visual` is about: of the decoder, or of the encoder that reads visual tokens.
        crosses: True for each of the layers below that attends to rows of an image or of an encoder.
        work: FLOPs of the layers; empty if not known.
        stored: what the layers cache; empty if not known.
        once: bytes that are cached whatever the prompt is.
        unknown: why a unit is not known for this model, by unit.
    """

    reads: Reads
    depth: int
    crosses: tuple[bool, ...] = ()
    work: tuple[Work, ...] = ()
    stored: tuple[Stored, ...] = ()
    once: int = 0
    unknown: Mapping[Unit, str] = field(default_factory=dict)

    @classmethod
    def of(cls, family: Family) -> "Prices":
        """Return the prices of a family's model; `unknown` says which units are not known for it, and why."""
        unknown: dict[Unit, str] = {}
        work, stored, crosses = list[Work](), list[Stored](), tuple[bool, ...]()
        try:
            crosses = tuple(bool(layer.crosses) for layer in layers_of(family))
            stored = stored_by(family)
        except PruningError as error:
            unknown = {"prefill_flops": str(error), "cache_bytes": str(error)}
        try:
            work = work_of(family)
        except PruningError as error:
            unknown["prefill_flops"] = str(error)
        once = 0
        if family.reads == "encoder":  # the decoder caches one row of the answer, in heads of the same size
            once = sum(layer.row_bytes for layer in stored)
        return cls(family.reads, family.depth, crosses, tuple(work), tuple(stored), once, unknown)

    def check(self, unit: Unit) -> None:
        """Raise PruningError if a unit is not known for this model."""
        if unit in self.unknown:
            raise PruningError(f"{unit}: {self.unknown[unit]}")

    def price(self, unit: Unit, prompts: Prompts, visual: Tensor | None = None) -> Tensor:
        """Return the price of each prompt: float64 [N] for `tokens_per_layer`, int64 [N] for the other units.

        Raises:
            PruningError: the unit is not known for this model.
        """
        self.check(unit)
        read = prompts.tokens[:, None].expand(-1, self.depth) if visual is None else visual
        if unit == "tokens":
            return read[:, -1]
        if unit == "tokens_per_layer":
            return read.sum(1).to(torch.float64) / self.depth
        queries, keys, cached, again = self._rows(prompts, read, pruned=visual is not None)
        if unit == "cache_bytes":
            most = self._each(self.stored, "most", cached)
            return (self._each(self.stored, "row_bytes", cached) * cached.minimum(most)).sum(1) + self.once
        per_query, per_key, per_pair, per_reading = (
            self._each(self.work, name, keys) for name in ("per_query", "per_key", "per_pair", "per_reading")
        )
        found = per_query * queries + per_key * keys + per_pair * queries * keys
        if again is not None:  # text that sees no image attends to all image rows
            blind, rows = again
            found = found + (per_reading * blind + per_key * rows + per_pair * blind * rows) * (blind > 0)
        return found.sum(1)

    def share(self, unit: Unit, prompts: Prompts, visual: Tensor, times: Tensor | int = 1) -> float:
        """Return what the prompts cost together, as a share of what they cost unpruned; 1.0 if that is nothing.

        `times`, [N], says how many there are of each.

        Raises:
            PruningError: the unit is not known for this model.
        """
        full = (self.price(unit, prompts) * times).sum().item()
        return (self.price(unit, prompts, visual) * times).sum().item() / full if full else 1.0

    @staticmethod
    def _each(layers: Sequence[Any], name: str, like: Tensor) -> Tensor:
        """Return an attribute of each layer, int64 [layers]."""
        return torch.tensor([getattr(layer, name) for layer in layers], dtype=torch.int64, device=like.device)

    def _rows(
        self, prompts: Prompts, read: Tensor, pruned: bool
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Return the rows of each layer that attend, those that they attend to, and those that it would cache.

        All are int64 [N, layers]. The last result, if any, are rows that attend to others as well, and those others.
        """
        text = prompts.text[:, None]
        rows = text + read
        if self.reads == "decoder":
            return rows, rows, rows, None
        if self.reads == "encoder":
            states = rows[:, -1:].expand(-1, len(self.crosses) - self.depth)
            keys = torch.cat([rows, states], 1)
            return torch.cat([rows, torch.ones_like(states)], 1), keys, keys, None
        crosses = torch.tensor(self.crosses, dtype=torch.bool, device=text.device)
        seen, stored = prompts.tokens[:, None], prompts.image_rows[:, None]
        if not pruned:
            read = seen = stored
        read, seen = (torch.where(prompts.tokens[:, None] > 0, part, stored) for part in (read, seen))
        image = torch.where(
            torch.arange(self.depth, dtype=torch.int64, device=text.device) == self.crosses.index(True), seen, read
        )
        alone = text.expand_as(read)
        queries = torch.where(crosses & (stored == 0), 0, alone)
        again = torch.where(crosses & (image < stored), prompts.blind[:, None], 0)
        cached = torch.where(crosses, read[:, -1:], alone)
        return queries, torch.where(crosses, image, alone), cached, (again, stored)
