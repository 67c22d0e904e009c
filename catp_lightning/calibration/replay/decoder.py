"""Replay of prompts that a decoder reads: recorded at its entry, answered again through the language model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from catp_lightning.calibration.replay.base import (
    Replay,
    answering_rows,
    changed_answers,
    first_answers,
    picked,
    text_fingerprint,
)
from catp_lightning.methods.selection import Selection
from catp_lightning.models import Family
from catp_lightning.prompt.call import ModelCall
from catp_lightning.prompt.kept import kept_sequence
from catp_lightning.prompt.merging import merged
from catp_lightning.prompt.prompt import DecoderPrompt, columns_kept
from catp_lightning.pruning.answers import Answer
from catp_lightning.pruning.pruner import Pruner
from catp_lightning.pruning.sites import PruneAtDecoderInput, PruneAtDecoderLayers, PruningSite, SiteSettings


@dataclass(frozen=True)
class DecoderReplay(Replay):
    """Replay of a batch of prompts recorded at the entry of the decoder.

    Attributes:
        prompt: the prompts as the decoder received them, without beams: B rows.
        layer: decoder layer at whose entry tokens leave; 0: before the first layer.
    """

    sites = (PruneAtDecoderInput, PruneAtDecoderLayers)

    prompt: DecoderPrompt
    layer: int = 0

    @classmethod
    def of(cls, family: Family, prompt: DecoderPrompt, answers: Answer, layer: int = 0) -> "DecoderReplay":
        beams = prompt.rows_per_sample
        vocabulary = family.language_model.config.get_text_config().vocab_size
        answers, rows = first_answers(answers, len(prompt.visual), vocabulary)
        embeds, mask, positions = (part[::beams] for part in (prompt.embeds, prompt.mask, prompt.positions))
        # Without what a StagePrompt adds, and without the call's arguments, among them the pixels.
        plain = DecoderPrompt.of(ModelCall(), 1, prompt.ids, prompt.visual, embeds, mask, positions, prompt.is_prompt)
        return cls(family, answers, rows, plain, layer)

    @property
    def tokens(self) -> Tensor:
        return self.prompt.tokens

    @property
    def lengths(self) -> Tensor:
        return (self.prompt.mask == 1).sum(1)

    @property
    def questions(self) -> Tensor:
        return text_fingerprint(self.prompt.ids, (self.prompt.mask == 1) & ~self.prompt.visual)

    @property
    def text_ids(self) -> Tensor:
        columns, valid = self.prompt.text_columns()
        return self.prompt.ids.gather(1, columns).where(valid, -1)

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        old = self.prompt
        parts = (old.ids, old.visual, old.embeds, old.mask, old.positions, old.is_prompt)
        prompt = DecoderPrompt.of(old.arguments, 1, *map(change, parts))
        return replace(self, prompt=prompt, answers=changed_answers(self.answers, change))

    def log_probabilities(self, keep: Tensor, destination: Tensor | None = None) -> Tensor:
        keep = keep[:, : self.tokens.shape[1]]  # these samples may have fewer tokens than the batch's longest
        if self.layer:
            settings = SiteSettings((self.layer,))
            return self._through(PruneAtDecoderLayers(self.family, lambda prompt: Selection(keep), settings))
        prompt = self.prompt
        embeds = prompt.embeds if destination is None else merged(prompt.embeds, prompt.visual, destination)
        # Padding is not read, but with padding on the right, generate predicts the first token from a padded row.
        read = (prompt.mask == 1).scatter(1, self.answers.row[:, None], True)
        short = kept_sequence(columns_kept(prompt.visual, keep) & read, prompt.mask)
        # The column that predicts the first token shifts left by the columns removed before it; fillers (dropped
        # columns that pad shorter rows) are not removed.
        first = (short.order <= self.answers.row[:, None]).sum(1, keepdim=True) - 1
        rows = self._with_answer(short.gather(embeds), short.short_mask, short.gather(prompt.positions))
        return self._answer(*rows, first)

    def pruned_log_probabilities(self, pruner: Pruner) -> Tensor:
        return self._through(pruner.site)

    def _through(self, site: PruningSite) -> Tensor:
        """Return log-probabilities [B, A, V] along the answer when tokens leave the whole prompt inside the decoder."""
        prompt, forced = self.prompt, self.answers.ids[:, :-1]
        nothing = torch.zeros_like(forced, dtype=torch.bool)
        embeds, mask, positions = self._with_answer(prompt.embeds, prompt.mask, prompt.positions)
        whole = replace(
            prompt,
            ids=torch.cat([prompt.ids, forced], 1),
            visual=torch.cat([prompt.visual, nothing], 1),
            is_prompt=torch.cat([prompt.is_prompt, nothing], 1),
            mask=mask,
            positions=positions,
            embeds=embeds,
        )
        with site.replaying(whole):
            return self._answer(embeds, mask, positions, self.answers.row[:, None])

    def _with_answer(self, embeds: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Append the answer's tokens, except the last, to rows [B, n, D] and to their mask and position ids [B, n]."""
        forced = self.answers.ids[:, :-1]
        steps = torch.arange(1, forced.shape[1] + 1, device=positions.device)
        later = self.prompt.positions.amax(1, keepdim=True) + steps  # continues the positions of the prompt
        read = self.family.model.get_input_embeddings()(forced).to(embeds.dtype)
        return (
            torch.cat([embeds, read], 1),
            torch.cat([mask, torch.ones_like(forced)], 1),
            torch.cat([positions, later], 1),
        )

    def _answer(self, embeds: Tensor, mask: Tensor, positions: Tensor, first: Tensor) -> Tensor:
        """Return log-probabilities [B, A, V] along the answer that ends rows [B, n, D].

        Row `first` [B, 1] predicts the answer's first token.
        """
        needed, place = answering_rows(self.answers, first, embeds.shape[1] - self.answers.ids.shape[1] + 1)
        logits = self.family.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            logits_to_keep=needed,
            use_cache=False,
        ).logits
        return picked(logits, place)
