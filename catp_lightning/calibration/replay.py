"""Prompts recorded at the entry of the language model, answered again with fewer tokens; vision runs once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from catp_lightning.answers import Answer
from catp_lightning.dropping import DecoderPrompt, columns_kept, shortened, visual_tokens
from catp_lightning.families import Family
from catp_lightning.fingerprint import mix

LOGITS = 2**22  # at most so many, 16 MiB in float32, are held at a time; a few tensors of that size are


@dataclass(frozen=True)
class Replay:
    """One batch: its prompts, and the unpruned model's answers, which are teacher-forced.

    Attributes:
        prompt: as the language model received it, without beams: B rows.
        answers: the answers, one to each prompt.
        rows: how many prompts are answered at a time, at most. A batch of the user's own fits the device; so does
            this many of its prompts, with fewer tokens.
    """

    family: Family
    prompt: DecoderPrompt
    answers: Answer
    rows: int

    @classmethod
    def of(cls, family: Family, prompt: DecoderPrompt, answers: Answer) -> "Replay":
        """Of beams, or of several answers to a prompt, the first is replayed."""
        rows = len(prompt.visual)
        beams, several = len(prompt.embeds) // rows, len(answers.ids) // rows
        first = Answer(answers.ids[::several], answers.valid[::several], rows, answers.row)
        prompt = replace(
            prompt,
            beams=1,
            embeds=prompt.embeds[::beams],
            mask=prompt.mask[::beams],
            positions=prompt.positions[::beams],
        )
        logits = first.ids.shape[1] * family.language_model.config.get_text_config().vocab_size
        return cls(family, prompt, first, max(1, min(rows, LOGITS // logits)))

    @property
    def visual(self) -> Tensor:
        """The placeholders: bool [B, L]."""
        return self.prompt.visual

    @property
    def questions(self) -> Tensor:
        """A fingerprint of each prompt's text, whatever its padding: int64 [B]."""
        text = (self.prompt.mask == 1) & ~self.visual
        return mix((mix(self.prompt.ids + mix(text.cumsum(1))) * text).sum(1))

    def of_samples(self, index: Tensor) -> "Replay":
        """Some of the samples: bool [B], or int64 of any length."""
        ids = self.answers.ids[index]
        answers = Answer(ids, self.answers.valid[index], len(ids), self.answers.row[index])
        old = self.prompt
        prompt = DecoderPrompt.of(
            old.arguments,
            1,
            *(part[index] for part in (old.ids, old.visual, old.embeds, old.mask, old.positions, old.asks)),
        )
        return replace(self, prompt=prompt, answers=answers)

    def answer_log_probability(self, keep: Tensor) -> Tensor:
        """Mean log-probability of the answer's tokens when only `keep` is read: bool [P, B, T] -> float [P, B]."""
        samples = torch.arange(keep.shape[1], device=keep.device).repeat(len(keep))
        dtype = torch.promote_types(self.prompt.embeds.dtype, torch.float32)
        found = torch.empty(len(samples), dtype=dtype, device=keep.device)
        for index, some, kept in self._chunks(samples, keep.flatten(0, 1)):
            found[index] = _mean_log_probability(some.log_probabilities(kept), some.answers).to(dtype)
        return found.view(keep.shape[:2])

    def compare(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """How the answers change when only `keep` is read: bool [C, B, T] -> divergence float and same bool, [C, B].

        Equal choices for one sample, frequent among candidates that resemble each other, are answered once.
        """
        return self.compare_each([keep])[0]

    def compare_each(self, keeps: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The same of several choices, which share the unpruned answers: of every budget, say."""
        samples, found = torch.arange(len(self.visual), device=self.visual.device), []
        for index in samples.split(self.rows):
            some = self.of_samples(index)
            full = some.log_probabilities(visual_tokens(some.visual))
            found.append([some._compare(full, keep[:, index]) for keep in keeps])
        return [
            (torch.cat([diverged for diverged, _ in parts], 1), torch.cat([agreed for _, agreed in parts], 1))
            for parts in zip(*found, strict=True)
        ]

    def _compare(self, full: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        samples = torch.arange(keep.shape[1], device=keep.device).repeat(len(keep))
        first, where = _distinct(samples, keep.flatten(0, 1))
        samples, distinct = samples[first], keep.flatten(0, 1)[first]
        diverged = full.new_empty(len(samples))
        agreed = torch.empty_like(diverged, dtype=torch.bool)
        for index, some, kept in self._chunks(samples, distinct):
            unpruned, pruned, valid = full[samples[index]], some.log_probabilities(kept), some.answers.valid
            diverged[index] = divergence(unpruned, pruned, valid)
            agreed[index] = agreement(unpruned, pruned, valid)
        return diverged[where].view(keep.shape[:2]), agreed[where].view(keep.shape[:2])

    def _chunks(self, samples: Tensor, keep: Tensor) -> Iterator[tuple[Tensor, "Replay", Tensor]]:
        """Some rows at a time, int64 [M] and bool [M, T], and which; equally long ones together: padding costs time."""
        length = (self.prompt.mask == 1).sum(1)[samples] + keep.sum(1)
        for index in length.argsort(stable=True).split(self.rows):
            yield index, self.of_samples(samples[index]), keep[index]

    def log_probabilities(self, keep: Tensor) -> Tensor:
        """Of every next token along the answer, when only `keep` [B, T] of the visual tokens are read: [B, A, V].

        A pruned greedy run gives the same answer exactly where the most likely token agrees all along the answer, so
        nothing needs to be generated again.
        """
        prompt, ids = self.prompt, self.answers.ids
        # Padding is read by nobody; but after padding on the right, generate predicts the first token from it.
        read = (prompt.mask == 1).scatter(1, self.answers.row[:, None], True)
        columns = columns_kept(prompt.visual, keep) & read
        short = shortened(columns, prompt.mask)
        forced = ids[:, :-1]
        embeds = self.family.model.get_input_embeddings()(forced).to(prompt.embeds.dtype)
        ahead = torch.ones_like(forced)
        full = torch.cat([prompt.mask, ahead], 1)
        later = self.family.positions(full)[:, prompt.mask.shape[1] :]
        # The column that predicts the first token has moved by the columns that are gone before it; fillers are not.
        first = (short.order <= self.answers.row[:, None]).sum(1, keepdim=True) - 1
        steps = torch.arange(ids.shape[1], device=first.device)
        rows = torch.where(steps == 0, first, short.order.shape[1] - 1 + steps)
        needed, place = rows.unique(return_inverse=True)  # the head's logits are most of the memory
        logits = self.family.language_model(
            inputs_embeds=torch.cat([short.shorten(prompt.embeds), embeds], 1),
            attention_mask=torch.cat([short.short_mask, ahead], 1),
            position_ids=torch.cat([short.shorten(prompt.positions), later], 1),
            logits_to_keep=needed,
            use_cache=False,
        ).logits
        picked = logits.gather(1, place[..., None].expand(-1, -1, logits.shape[-1]))
        return picked.to(torch.promote_types(picked.dtype, torch.float32)).log_softmax(-1)


def divergence(full: Tensor, pruned: Tensor, valid: Tensor) -> Tensor:
    """Mean over the answer's tokens of KL(full || pruned), in nats: [B, A, V], [B, A, V], bool [B, A] -> [B]."""
    each = (full.exp() * (full - pruned)).sum(-1)
    return (each * valid).sum(1) / valid.sum(1)


def agreement(full: Tensor, pruned: Tensor, valid: Tensor) -> Tensor:
    """Whether the most likely token is the same all along the answer: -> bool [B]."""
    return ((full.argmax(-1) == pruned.argmax(-1)) | ~valid).all(1)


def _mean_log_probability(log_probabilities: Tensor, answers: Answer) -> Tensor:
    each = log_probabilities.gather(2, answers.ids[..., None])[..., 0]
    return (each * answers.valid).sum(1) / answers.valid.sum(1)


def _distinct(samples: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of `keep` [M, T] that differ, or belong to another sample [M]: their places, and for every row its own."""
    marks = mix(torch.arange(1, keep.shape[1] + 1, device=keep.device))
    key = mix(mix(samples)) + (keep * marks).sum(1)  # twice: sample 3 is not token 3
    values, where = key.unique(return_inverse=True)
    places = torch.arange(len(key), device=key.device)
    return torch.empty_like(values).scatter_(0, where, places), where
