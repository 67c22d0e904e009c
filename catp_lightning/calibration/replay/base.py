"""Answer recorded prompts again with fewer visual tokens, teacher-forced; the vision tower runs once."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from catp_lightning.methods.selection import Selection
from catp_lightning.models import Family
from catp_lightning.pruning.answers import Answer
from catp_lightning.pruning.pruner import Pruner
from catp_lightning.pruning.sites import PruningSite
from catp_lightning.utils.hashing import mix

LOGITS = 2**22  # logits of one chunk at most, 16 MiB in float32; a few tensors of that size are held


@dataclass(frozen=True)
class Variants:
    """Candidates that are compared at one budget.

    Attributes:
        keep: bool [C, B, T], visual tokens kept by each of C candidates that drop before the decoder.
        selections: [B, T], of candidates that merge tokens before the decoder.
        inside: candidates that choose inside the decoder, where signals depend on their own earlier choices; with
            what they keep at its input, [B, T], or None.
    """

    keep: Tensor
    selections: Sequence[Selection] = ()
    inside: Sequence[tuple[Pruner, Selection | None]] = ()


@dataclass(frozen=True)
class Replay(ABC):
    """Batch of recorded prompts with the unpruned model's answers, which are teacher-forced.

    Attributes:
        family: family of the model.
        answers: answers of the unpruned model, one to each prompt: B rows.
        rows: limit on the prompts that are answered at a time. The user's own batch fits the device, so this many of
            its prompts with fewer tokens do too.
        sites: places where tokens leave whose prompts it answers again.
    """

    sites: ClassVar[tuple[type[PruningSite], ...]]

    family: Family
    answers: Answer
    rows: int

    @classmethod
    @abstractmethod
    def of(cls, family: Family, prompt: Any, answers: Answer, layer: int = 0) -> Self:
        """Build the replay of recorded prompts; of several beams or answers to a prompt, the first is replayed.

        Args:
            family: family of the model.
            prompt: the prompts, as one of the `sites` gave them to be decided on.
            answers: answers of the unpruned model.
            layer: decoder layer at whose entry tokens leave; 0: before the first layer.

        Raises:
            PruningError: the prompts cannot be answered again.
        """

    def prepared(self) -> Self:
        """Return a replay of many candidates: what they share is computed once, and is gone with what is returned."""
        return self

    @property
    @abstractmethod
    def tokens(self) -> Tensor:
        """Visual tokens of each sample: bool [B, T]."""

    @property
    @abstractmethod
    def lengths(self) -> Tensor:
        """Number of positions of each prompt without padding, to put prompts of similar length together: int64 [B]."""

    @property
    @abstractmethod
    def sizes(self) -> Tensor:
        """Sizes of each prompt, int64 [B, 4]: `text`, `tokens`, `image_rows` and `blind` of `pricing.Prompts`."""

    @property
    @abstractmethod
    def questions(self) -> Tensor:
        """Fingerprint of each prompt's text, whatever its padding: int64 [B]."""

    @property
    @abstractmethod
    def text_ids(self) -> Tensor:
        """Token ids of the text whose mean embedding is `Signal.QUESTION`, in its order, then -1: int64 [B, R].

        Neither padding nor placeholders of images are in it; R is the number of ids of the longest.
        """

    @abstractmethod
    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the replay with `change` applied to every tensor; each has a row for each sample."""

    def of_samples(self, index: Tensor) -> Self:
        """Return the replay of some of the samples: index is bool [B], or int64 of any length."""
        return self.each(lambda part: part[index])

    @abstractmethod
    def log_probabilities(self, keep: Tensor, destination: Tensor | None = None) -> Tensor:
        """Return log-probabilities [B, A, V] along the answer if only `keep` [B, T] of the visual tokens are read.

        They are those of every next token, A answer tokens, vocabulary V. A pruned greedy run gives the same answer
        exactly where the most likely token agrees all along the answer, so nothing needs to be generated again. For
        merged tokens `destination`, int64 [B, T], is the token that each is merged into.
        """

    def pruned_log_probabilities(self, pruner: Pruner) -> Tensor:
        """Return log-probabilities [B, A, V] along the answer under a policy that chooses inside the decoder.

        What it keeps at the decoder's input, if tokens leave there too, is known: its `entry`.

        Raises:
            NotImplementedError: the family has no stages inside its decoder.
        """
        raise NotImplementedError(f"{type(self.family.model).__name__} has no stages inside its decoder")

    def is_finite(self) -> Tensor:
        """Return True where the unpruned answer has a finite log-probability, neither NaN nor infinite: bool [B]."""
        some = [
            self.of_samples(index)
            for index in torch.arange(len(self.tokens), device=self.tokens.device).split(self.rows)
        ]
        found = [_mean_log_probability(part.log_probabilities(part.tokens), part.answers) for part in some]
        return torch.cat(found).isfinite()

    def answer_log_probability(self, keep: Tensor) -> Tensor:
        """Return the mean log-probability of an answer's tokens if only `keep` is read: bool [P, B, T] -> [P, B]."""
        samples = torch.arange(keep.shape[1], device=keep.device).repeat(len(keep))
        found: Tensor | None = None
        for index, some, kept in self.prepared()._chunks(samples, keep.flatten(0, 1)):
            each = _mean_log_probability(some.log_probabilities(kept), some.answers)
            found = each.new_empty(len(samples)) if found is None else found
            found[index] = each
        assert found is not None  # there is at least one sample
        return found.view(keep.shape[:2])

    def compare(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Compare the answers if only `keep` [C, B, T] is read with the unpruned ones, for C candidates.

        Equal choices for one sample, frequent among similar candidates, are answered once.

        Returns:
            Divergence, float [C, B], and whether the answer is the same, bool [C, B].
        """
        return self.compare_each([Variants(keep)])[0]

    def compare_each(self, ways: Sequence[Variants]) -> list[tuple[Tensor, Tensor]]:
        """Run `compare` for several sets of candidates (one for each budget, say), which share the unpruned answers."""
        samples, found = torch.arange(len(self.tokens), device=self.tokens.device), []
        for index in samples.split(self.rows):
            some = self.of_samples(index).prepared()
            full = some.log_probabilities(some.tokens)
            found.append([some._compare(full, index, way) for way in ways])
        return [
            (torch.cat([diverged for diverged, _ in parts], 1), torch.cat([agreed for _, agreed in parts], 1))
            for parts in zip(*found, strict=True)
        ]

    def _compare(self, full: Tensor, index: Tensor, way: Variants) -> tuple[Tensor, Tensor]:
        """Compare one chunk: `index` are its places in the batch, `full` [B, A, V] its unpruned log-probabilities."""
        diverged, agreed = self._compare_kept(full, way.keep[:, index])
        others = [
            *(partial(self._selected, selection, index) for selection in way.selections),
            *(partial(self._inside, pruner, entry, index) for pruner, entry in way.inside),
        ]
        for answered in others:
            pruned = answered()
            diverged = torch.cat([diverged, divergence(full, pruned, self.answers.valid)[None]])
            agreed = torch.cat([agreed, agreement(full, pruned, self.answers.valid)[None]])
        return diverged, agreed

    def _selected(self, selection: Selection, index: Tensor) -> Tensor:
        destination = None if selection.destination is None else selection.destination[index]
        return self.log_probabilities(selection.keep[index], destination)

    def _inside(self, pruner: Pruner, entry: Selection | None, index: Tensor) -> Tensor:
        if entry is None:
            return self.pruned_log_probabilities(pruner)
        with pruner.knowing(entry.of_rows(index, self.tokens.shape[1])):
            return self.pruned_log_probabilities(pruner)

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
        """Split M rows (sample int64 [M], kept tokens bool [M, T]) into chunks: yield places, replay and kept tokens.

        Rows of similar length are chunked together, because padding costs time.
        """
        length = self.lengths[samples] + keep.sum(1)
        for index in length.argsort(stable=True).split(self.rows) if len(samples) else ():
            yield index, self.of_samples(samples[index]), keep[index]


def first_answers(answers: Answer, prompts: int, vocabulary: int) -> tuple[Answer, int]:
    """Return the first of several beams or answers to each prompt, and the number of prompts to answer at a time."""
    several = len(answers.ids) // prompts
    first = Answer(answers.ids[::several], answers.valid[::several], prompts, answers.row)
    return first, max(1, min(prompts, LOGITS // (first.ids.shape[1] * vocabulary)))


def changed_answers(answers: Answer, change: Callable[[Tensor], Tensor]) -> Answer:
    """Return answers, one to each prompt, with `change` applied to every tensor; each has a row for each sample."""
    ids = change(answers.ids)
    return Answer(ids, change(answers.valid), len(ids), change(answers.row))


def answering_rows(answers: Answer, first: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the rows of a prompt with its forced answer that predict the answer's tokens.

    Args:
        answers: the answers.
        first: int64 [B, 1], row that predicts the first token.
        length: number of rows before the forced answer.

    Returns:
        The rows needed, int64 [n], ascending, and for each of the answer's tokens its place among them, int64 [B, A].
    """
    steps = torch.arange(answers.ids.shape[1], device=first.device)
    rows = torch.where(steps == 0, first, length - 1 + steps)
    needed, place = rows.unique(return_inverse=True)  # the logits take most of the memory
    return needed, place


def picked(logits: Tensor, place: Tensor) -> Tensor:
    """Return log-probabilities, float32 at least, of the rows each answer needs: [B, n, V], [B, A] -> [B, A, V]."""
    logits = logits.gather(1, place[..., None].expand(-1, -1, logits.shape[-1]))
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def text_fingerprint(ids: Tensor, text: Tensor) -> Tensor:
    """Return a fingerprint of the ids where `text`, in their order: int64 and bool [B, L columns] -> int64 [B]."""
    return mix((mix(ids + mix(text.cumsum(1))) * text).sum(1))


def divergence(full: Tensor, pruned: Tensor, valid: Tensor) -> Tensor:
    """Return the answer's mean KL(full || pruned) over its tokens, in nats: [B, A, V] twice, bool [B, A] -> [B]."""
    each = (full.exp() * (full - pruned)).sum(-1)
    return (each * valid).sum(1) / valid.sum(1)


def agreement(full: Tensor, pruned: Tensor, valid: Tensor) -> Tensor:
    """Return True if the most likely token agrees all along the answer: [B, A, V] twice, bool [B, A] -> bool [B]."""
    return ((full.argmax(-1) == pruned.argmax(-1)) | ~valid).all(1)


def _mean_log_probability(log_probabilities: Tensor, answers: Answer) -> Tensor:
    each = log_probabilities.gather(2, answers.ids[..., None])[..., 0]
    return (each * answers.valid).sum(1) / answers.valid.sum(1)


def _distinct(samples: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Find distinct pairs of a sample [M] and a row of `keep` [M, T]: places, and for each pair the one it equals."""
    marks = mix(torch.arange(1, keep.shape[1] + 1, device=keep.device))
    key = mix(mix(samples)) + (keep * marks).sum(1)  # mixed twice, or sample 3 would count like token 3
    values, where = key.unique(return_inverse=True)
    places = torch.arange(len(key), device=key.device)
    return torch.empty_like(values).scatter_(0, where, places), where
