"""Replay of prompts that a decoder reads: recorded at its entry, answered again through the language model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from catp_lightning.calibration.replay.base import answering_rows, first_answers, picked
from catp_lightning.calibration.replay.prompts import PromptReplay, without_beams
from catp_lightning.methods.selection import Selection
from catp_lightning.models import Family
from catp_lightning.prompt.kept import kept_sequence
from catp_lightning.prompt.masks import extended, prefill_masks, recurrent
from catp_lightning.prompt.merging import merged, written
from catp_lightning.prompt.prompt import DecoderPrompt, columns_kept
from catp_lightning.pruning.answers import Answer
from catp_lightning.pruning.pruner import Pruner
from catp_lightning.pruning.sites import PruneAtDecoderInput, PruneAtDecoderLayers, PruningSite, SiteSettings
from catp_lightning.utils.hooks import hooked


@dataclass(frozen=True)
class DecoderReplay(PromptReplay):
    """Replay of a batch of prompts recorded at the entry of the decoder.

    Attributes:
        layer: decoder layer at whose entry tokens leave; 0: before the first layer.
    """

    sites = (PruneAtDecoderInput, PruneAtDecoderLayers)

    layer: int = 0

    @classmethod
    def of(cls, family: Family, prompt: DecoderPrompt, answers: Answer, layer: int = 0) -> "DecoderReplay":
        vocabulary = family.language_model.config.get_text_config().vocab_size
        answers, rows = first_answers(answers, len(prompt.visual), vocabulary)
        return cls(family, answers, rows, without_beams(prompt), layer)

    def log_probabilities(self, keep: Tensor, destination: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Return log-probabilities [B, A, V] along the answer, as in the base class.

        `rows`, float [B, T, D], is what is read in the place of each visual token; None: the token. Gradients reach it.
        """
        keep = keep[:, : self.tokens.shape[1]]  # these samples may have fewer tokens than the batch's longest
        if self.layer:
            settings = SiteSettings((self.layer,))
            return self.through(PruneAtDecoderLayers(self.family, lambda prompt: Selection(keep), settings))
        prompt, whole, family = self.prompt, self._with_answer(), self.family
        # Padding is not read, but with padding on the right, generate predicts the first token from a padded row.
        read = (prompt.mask == 1).scatter(1, self.answers.row[:, None], True)
        columns = torch.ones_like(whole.visual)
        columns[:, : read.shape[1]] = columns_kept(prompt.visual, keep) & read
        short = kept_sequence(columns, whole.mask, recurrent(family.decoder_config))
        first = ((short.order == self.answers.row[:, None]) & short.valid).long().argmax(1, keepdim=True)
        embeds, inputs = whole.embeds, _inputs(whole)
        if destination is not None:
            embeds = merged(embeds, whole.visual, destination)
            inputs = {**inputs, **family.merge_extras(inputs, whole.visual, destination)}
        if rows is not None:
            embeds = written(embeds, whole.visual, rows)
        inputs = family.gather_extras(inputs, short, whole.visual)
        masks = prefill_masks(whole.masks, short, family.decoder_config, embeds.dtype)
        if isinstance(masks, dict) or masks.dim() == 4:
            inputs = {**inputs, "attention_mask": masks}
        with _entered_with(family.decoder, inputs):
            positions = short.gather_positions(whole.positions, compact=False)
            return self._answer(short.gather(embeds), short.short_mask, positions, first, inputs)

    def pruned_log_probabilities(self, pruner: Pruner) -> Tensor:
        return self.through(pruner.site)

    def through(self, site: PruningSite) -> Tensor:
        """Return log-probabilities [B, A, V] along the answer when tokens leave the whole prompt inside the decoder."""
        whole = self._with_answer()
        inputs = _inputs(whole) | ({} if whole.masks is None else {"attention_mask": whole.masks})
        with _entered_with(self.family.decoder, inputs), site.replaying(whole):
            return self._answer(whole.embeds, whole.mask, whole.positions, self.answers.row[:, None], inputs)

    def _with_answer(self) -> DecoderPrompt:
        """Return the prompts with the answers' tokens, except the last, after them."""
        prompt, forced = self.prompt, self.answers.ids[:, :-1]
        nothing = torch.zeros_like(forced, dtype=torch.bool)
        mask = torch.cat([prompt.mask, torch.ones_like(forced)], 1)
        words = self.family.model.get_input_embeddings()(forced).to(prompt.embeds.dtype)
        embeds = torch.cat([prompt.embeds, words], 1)
        columns = self.family.inputs_of_text(prompt.by_column, forced, words)
        steps = torch.arange(1, forced.shape[1] + 1, device=forced.device)
        last = prompt.positions.amax(-1, keepdim=True)
        if last.dim() > 2:  # time, height and width of what comes after an image are equal
            last = torch.cat([last[:-3], last[-3:].amax(0).expand_as(last[-3:])])
        masks, config = prompt.masks, self.family.decoder_config
        return replace(
            prompt,
            ids=torch.cat([prompt.ids, forced], 1),
            visual=torch.cat([prompt.visual, nothing], 1),
            is_prompt=torch.cat([prompt.is_prompt, nothing], 1),
            mask=mask,
            positions=torch.cat([prompt.positions, last + steps], -1),
            embeds=embeds,
            masks=None if masks is None else extended(masks, mask, config, embeds.dtype),
            by_column={name: torch.cat([part, columns[name]], 1) for name, part in prompt.by_column.items()},
        )

    def _answer(
        self, embeds: Tensor, mask: Tensor, positions: Tensor, first: Tensor, inputs: Mapping[str, Any]
    ) -> Tensor:
        """Return log-probabilities [B, A, V] along the answer that ends rows [B, n, D].

        Row `first` [B, 1] predicts the answer's first token. Of `inputs` the model itself is given those by column.
        """
        needed, place = answering_rows(self.answers, first, embeds.shape[1] - self.answers.ids.shape[1] + 1)
        logits = self.family.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            logits_to_keep=needed,
            use_cache=False,
            **{name: inputs[name] for name in self.prompt.by_column},
        ).logits
        if logits.shape[1] > len(needed):  # not all models know logits_to_keep
            logits = logits[:, needed]
        return picked(logits, place)


def _inputs(prompt: DecoderPrompt) -> dict[str, Any]:
    """Return the decoder's inputs for visual rows beside the rows themselves, as the model's own code passes them."""
    found: dict[str, Any] = dict(prompt.by_column)
    if prompt.deepstack:
        features = [padded[prompt.tokens] for padded in prompt.deepstack]
        found |= {"visual_pos_masks": prompt.visual, "deepstack_visual_embeds": features}
    return found


@contextmanager
def _entered_with(decoder: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Replace arguments with which a decoder is called while inside; the model's own code made them of text alone."""
    if not inputs:
        yield
        return
    with hooked(decoder, lambda module, args, kwargs: (args, {**kwargs, **inputs})):
        yield
