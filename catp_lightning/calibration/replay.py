"""Recorded prompts answered again with fewer tokens, teacher-forced; vision runs once."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from catp_lightning.answers import Answer
from catp_lightning.choosing import Choice
from catp_lightning.families import Family
from catp_lightning.fingerprint import mix
from catp_lightning.pruning import Pruning

LOGITS = 2**22  # at most so many, 16 MiB in float32, are held at a time; a few tensors of that size are


@dataclass(frozen=True)
class Variants:
    """What is compared at one budget.

    Attributes:
        keep: bool [C, B, T], tokens that stay where they are dropped before the decoder, a row for each candidate.
        others: candidates that merge tokens, or choose inside the decoder, where what they see depends on themselves.
    """

    keep: Tensor
    others: Sequence[Choice | Pruning] = ()


@dataclass(frozen=True)
class Replay(ABC):
    """One batch: its prompts, and the unpruned model's answers, which are teacher-forced.

    Attributes:
        answers: the answers, one to each prompt: B rows.
        rows: how many prompts are answered at a time, at most. A batch of the user's own fits the device; so does
            this many of its prompts, with fewer tokens.
    """

    family: Family
    answers: Answer
    rows: int

    @property
    @abstractmethod
    def tokens(self) -> Tensor:
        """Which visual tokens each sample has: bool [B, T]."""

    @property
    @abstractmethod
    def lengths(self) -> Tensor:
        """Text and what precedes it, without visual tokens: int64 [B]."""

    @property
    @abstractmethod
    def questions(self) -> Tensor:
        """A fingerprint of each prompt's text, whatever its padding: int64 [B]."""

    @abstractmethod
    def of_samples(self, index: Tensor) -> "Replay":
        """Some of the samples: bool [B], or int64 of any length."""

    @abstractmethod
    def log_probabilities(self, keep: Tensor, carrier: Tensor | None = None) -> Tensor:
        """Of every next token along the answer, when only `keep` [B, T] of the visual tokens are read: [B, A, V].

        A pruned greedy run gives the same answer exactly where the most likely token agrees all along the answer, so
        nothing needs to be generated again. `carrier`, int64 [B, T], says which tokens carry others.
        """

    def pruned_log_probabilities(self, pruning: Pruning) -> Tensor:
        """The same where a policy chooses inside the decoder."""
        raise NotImplementedError(f"{type(self.family.model).__name__} has no stages inside its decoder")

    def sound(self) -> Tensor:
        """Where the unpruned answer has a probability that is a number: bool [B]."""
        some = [
            self.of_samples(index)
            for index in torch.arange(len(self.tokens), device=self.tokens.device).split(self.rows)
        ]
        found = [_mean_log_probability(part.log_probabilities(part.tokens), part.answers) for part in some]
        return torch.cat(found).isfinite()

    def answer_log_probability(self, keep: Tensor) -> Tensor:
        """Mean log-probability of the answer's tokens when only `keep` is read: bool [P, B, T] -> float [P, B]."""
        samples = torch.arange(keep.shape[1], device=keep.device).repeat(len(keep))
        found: Tensor | None = None
        for index, some, kept in self._chunks(samples, keep.flatten(0, 1)):
            each = _mean_log_probability(some.log_probabilities(kept), some.answers)
            found = each.new_empty(len(samples)) if found is None else found
            found[index] = each
        assert found is not None  # there is at least one sample
        return found.view(keep.shape[:2])

    def compare(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """How the answers change when only `keep` is read: bool [C, B, T] -> divergence float and same bool, [C, B].

        Equal choices for one sample, frequent among candidates that resemble each other, are answered once.
        """
        return self.compare_each([Variants(keep)])[0]

    def compare_each(self, ways: Sequence[Variants]) -> list[tuple[Tensor, Tensor]]:
        """The same of several sets of candidates, which share the unpruned answers: of every budget, say."""
        samples, found = torch.arange(len(self.tokens), device=self.tokens.device), []
        for index in samples.split(self.rows):
            some = self.of_samples(index)
            full = some.log_probabilities(some.tokens)
            found.append([some._compare(full, index, way) for way in ways])
        return [
            (torch.cat([diverged for diverged, _ in parts], 1), torch.cat([agreed for _, agreed in parts], 1))
            for parts in zip(*found, strict=True)
        ]

    def _compare(self, full: Tensor, index: Tensor, way: Variants) -> tuple[Tensor, Tensor]:
        """Of some samples, `index` int64 of all: those that `full` [B, A, V] is of."""
        diverged, agreed = self._compare_kept(full, way.keep[:, index])
        for other in way.others:
            if isinstance(other, Pruning):
                pruned = self.pruned_log_probabilities(other)
            else:
                carrier = None if other.carrier is None else other.carrier[index]
                pruned = self.log_probabilities(other.keep[index], carrier)
            diverged = torch.cat([diverged, divergence(full, pruned, self.answers.valid)[None]])
            agreed = torch.cat([agreed, agreement(full, pruned, self.answers.valid)[None]])
        return diverged, agreed

    def _compare_kept(self, full: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
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
        length = self.lengths[samples] + keep.sum(1)
        for index in length.argsort(stable=True).split(self.rows) if len(samples) else ():
            yield index, self.of_samples(samples[index]), keep[index]


def first_answers(answers: Answer, prompts: int, vocabulary: int) -> tuple[Answer, int]:
    """Of beams, or of several answers to a prompt, the first; and how many prompts are answered at a time."""
    several = len(answers.ids) // prompts
    first = Answer(answers.ids[::several], answers.valid[::several], prompts, answers.row)
    return first, max(1, min(prompts, LOGITS // (first.ids.shape[1] * vocabulary)))


def some_answers(answers: Answer, index: Tensor) -> Answer:
    """Of some of the samples."""
    ids = answers.ids[index]
    return Answer(ids, answers.valid[index], len(ids), answers.row[index])


def answering_rows(answers: Answer, first: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Rows of a prompt and its forced answer that predict the answer's tokens.

    Args:
        answers: the answers.
        first: int64 [B, 1], the row that predicts the first token.
        length: rows before the forced answer.

    Returns:
        The rows needed, int64 [n], ascending, and for each of the answer's tokens its place among them, int64 [B, A].
    """
    steps = torch.arange(answers.ids.shape[1], device=first.device)
    rows = torch.where(steps == 0, first, length - 1 + steps)
    needed, place = rows.unique(return_inverse=True)  # the head's logits are most of the memory
    return needed, place


def picked(logits: Tensor, place: Tensor) -> Tensor:
    """Log-probabilities in float32 at least, of the rows that each answer needs: [B, n, V], [B, A] -> [B, A, V]."""
    logits = logits.gather(1, place[..., None].expand(-1, -1, logits.shape[-1]))
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def text_fingerprint(ids: Tensor, text: Tensor) -> Tensor:
    """Of the ids where `text`, in their order: int64 [B, L], bool [B, L] -> int64 [B]."""
    return mix((mix(ids + mix(text.cumsum(1))) * text).sum(1))


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
