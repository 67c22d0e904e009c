"""Replay of prompts that an encoder reads (T5), answered again by the decoder behind it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from catp_lightning.calibration.replay.base import first_answers
from catp_lightning.calibration.replay.prompts import PromptReplay, without_beams
from catp_lightning.methods.selection import Selection
from catp_lightning.models import Family
from catp_lightning.prompt.prompt import DecoderPrompt
from catp_lightning.pruning.answers import Answer
from catp_lightning.pruning.pruner import Pruner
from catp_lightning.pruning.sites import PruneAtEncoderInput, PruneAtEncoderLayers, PruningSite, SiteSettings


@dataclass(frozen=True)
class EncoderReplay(PromptReplay):
    """Replay of a batch of prompts recorded at the entry of the encoder.

    Attributes:
        start: the token that the decoder starts each answer from, which is no part of `answers`: int64 [B, 1].
        layer: block of the encoder at whose entry tokens leave; 0: before the first block.
    """

    sites = (PruneAtEncoderInput, PruneAtEncoderLayers)

    start: Tensor
    layer: int = 0

    @classmethod
    def of(cls, family: Family, prompt: DecoderPrompt, answers: Answer, layer: int = 0) -> "EncoderReplay":
        after = Answer(answers.ids[:, 1:], answers.valid[:, 1:], answers.prompts, answers.row)
        vocabulary = family.language_model.config.get_text_config().vocab_size
        first, rows = first_answers(after, len(prompt.visual), vocabulary)
        start = answers.ids[:: len(answers.ids) // len(first.ids), :1]
        return cls(family, first, rows, without_beams(prompt), start, layer)

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(super().each(change), start=change(self.start))

    def log_probabilities(self, keep: Tensor, destination: Tensor | None = None) -> Tensor:
        assert destination is None  # selectors that merge are refused here
        keep = keep[:, : self.tokens.shape[1]]  # these samples may have fewer tokens than the batch's longest
        place, stages = (PruneAtEncoderLayers, (self.layer,)) if self.layer else (PruneAtEncoderInput, ())
        return self._through(place(self.family, lambda prompt: Selection(keep), SiteSettings(stages)))

    def pruned_log_probabilities(self, pruner: Pruner) -> Tensor:
        return self._through(pruner.site)

    def _through(self, site: PruningSite) -> Tensor:
        """Return log-probabilities [B, A, V] along the answer when tokens leave the prompt at a place."""
        prompt = self.prompt
        with site.replaying(prompt):
            logits = self.family.language_model(
                inputs_embeds=prompt.embeds,
                attention_mask=prompt.mask,
                decoder_input_ids=torch.cat([self.start, self.answers.ids[:, :-1]], 1),
                use_cache=False,
            ).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
