"""A prompt recorded at the entry of the language model, answered again with fewer tokens; vision runs once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from catp_lightning.answers import Answer
from catp_lightning.choosing import columns_kept
from catp_lightning.dropping import Prompt, shortened
from catp_lightning.families import Family


@dataclass(frozen=True)
class Replay:
    """One batch: its prompts, and the unpruned model's answers, which are teacher-forced.

    Attributes:
        visual: bool [B, L], the placeholders.
        embeds: float [B, L, D], mask int64 [B, L], positions int64 [B, L]: the prompt as the language model received
            it.
        answers: the answers, one to each prompt.
    """

    family: Family
    visual: Tensor
    embeds: Tensor
    mask: Tensor
    positions: Tensor
    answers: Answer

    @classmethod
    def of(cls, family: Family, prompt: Prompt, answers: Answer) -> "Replay":
        """Of beams, or of several answers to a prompt, the first is replayed."""
        rows = len(prompt.visual)
        beams, several = len(prompt.embeds) // rows, len(answers.ids) // rows
        first = Answer(answers.ids[::several], answers.valid[::several], rows, answers.row)
        return cls(
            family, prompt.visual, prompt.embeds[::beams], prompt.mask[::beams], prompt.positions[::beams], first
        )

    def of_samples(self, index: Tensor) -> "Replay":
        """Some of the samples: bool [B]."""
        answers = Answer(self.answers.ids[index], self.answers.valid[index], int(index.sum()), self.answers.row[index])
        prompt = (self.visual[index], self.embeds[index], self.mask[index], self.positions[index])
        return Replay(self.family, *prompt, answers)

    def answer_log_probability(self, keep: Tensor) -> Tensor:
        """Mean log-probability of the answer's tokens when only `keep` [B, T] is read: [B]."""
        each = self.log_probabilities(keep).gather(2, self.answers.ids[..., None])[..., 0]
        return (each * self.answers.valid).sum(1) / self.answers.valid.sum(1)

    def log_probabilities(self, keep: Tensor) -> Tensor:
        """Of every next token along the answer, when only `keep` [B, T] of the visual tokens are read: [B, A, V].

        A pruned greedy run gives the same answer exactly where the most likely token agrees all along the answer, so
        nothing needs to be generated again.
        """
        columns = columns_kept(self.visual, keep)
        prompt = shortened(columns, self.mask)
        forced = self.answers.ids[:, :-1]
        embeds = self.family.model.get_input_embeddings()(forced).to(self.embeds.dtype)
        ahead = torch.ones_like(forced)
        full = torch.cat([self.mask, ahead], 1)
        later = self.family.positions(full)[:, self.mask.shape[1] :]
        logits = self.family.language_model(
            inputs_embeds=torch.cat([prompt.shorten(self.embeds), embeds], 1),
            attention_mask=torch.cat([prompt.short_mask, ahead], 1),
            position_ids=torch.cat([prompt.shorten(self.positions), later], 1),
            use_cache=False,
        ).logits
        # The column that predicts the first token has moved by the columns dropped before it.
        first = columns.cumsum(1).gather(1, self.answers.row[:, None]) - 1
        steps = torch.arange(self.answers.ids.shape[1], device=first.device)
        rows = torch.where(steps == 0, first, prompt.order.shape[1] - 1 + steps)
        picked = logits.gather(1, rows[..., None].expand(-1, -1, logits.shape[-1]))
        return picked.to(torch.promote_types(picked.dtype, torch.float32)).log_softmax(-1)


def divergence(full: Tensor, pruned: Tensor, valid: Tensor) -> Tensor:
    """Mean over the answer's tokens of KL(full || pruned), in nats: [B, A, V], [B, A, V], bool [B, A] -> [B]."""
    each = (full.exp() * (full - pruned)).sum(-1)
    return (each * valid).sum(1) / valid.sum(1)


def agreement(full: Tensor, pruned: Tensor, valid: Tensor) -> Tensor:
    """Whether the most likely token is the same all along the answer: -> bool [B]."""
    return ((full.argmax(-1) == pruned.argmax(-1)) | ~valid).all(1)
