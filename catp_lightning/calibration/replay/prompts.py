"""Replay of prompts that an encoder or a decoder reads, as they were recorded at its entry."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from catp_lightning.calibration.replay.base import Replay, changed_answers, text_fingerprint
from catp_lightning.prompt.call import ModelCall
from catp_lightning.prompt.masks import Masks
from catp_lightning.prompt.prompt import DecoderPrompt, visual_tokens


@dataclass(frozen=True)
class PromptReplay(Replay):
    """Replay of a batch of prompts whose visual tokens are rows like those of text.

    Attributes:
        prompt: the prompts as the language model received them, without beams: B rows. Its `masks` have B rows each,
            its `deepstack` is [B, T, D].
    """

    prompt: DecoderPrompt

    @property
    def tokens(self) -> Tensor:
        return self.prompt.tokens

    @property
    def lengths(self) -> Tensor:
        return (self.prompt.mask == 1).sum(1)

    @property
    def sizes(self) -> Tensor:
        tokens = self.tokens.sum(1)
        return torch.stack([self.prompt.mask.sum(1) - tokens, tokens, tokens, torch.zeros_like(tokens)], 1)

    @property
    def questions(self) -> Tensor:
        return text_fingerprint(self.prompt.ids, (self.prompt.mask == 1) & ~self.prompt.visual)

    @property
    def text_ids(self) -> Tensor:
        columns, valid = self.prompt.text_columns()
        return self.prompt.ids.gather(1, columns).where(valid, -1)

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        prompt = _changed(self.prompt, change)
        return replace(self, prompt=prompt, answers=changed_answers(self.answers, change))


def without_beams(prompt: DecoderPrompt) -> DecoderPrompt:
    """Return recorded prompts without beams, and without the arguments of their call, among them the pixels."""
    beams, samples = prompt.rows_per_sample, len(prompt.ids)
    owners = visual_tokens(prompt.visual).repeat_interleave(beams, 0)
    features = []
    for flat in prompt.deepstack:
        padded = flat.new_zeros(*owners.shape, flat.shape[-1])
        padded[owners] = flat
        features.append(padded[::beams])

    def first(part: Tensor) -> Tensor:
        """Select the first beam of each sample; a mask of one row is that of all."""
        return part.expand(samples, *part.shape[1:]) if len(part) == 1 else part[::beams]

    parts = (prompt.embeds[::beams], prompt.mask[::beams], prompt.positions[..., ::beams, :])
    plain = DecoderPrompt.of(ModelCall(), 1, prompt.ids, prompt.visual, *parts, prompt.is_prompt)
    columns = {name: part[::beams] for name, part in prompt.by_column.items()}
    return replace(plain, masks=_of_each_mask(prompt.masks, first), by_column=columns, deepstack=tuple(features))


def _changed(prompt: DecoderPrompt, change: Callable[[Tensor], Tensor]) -> DecoderPrompt:
    """Return prompts with `change` applied to every tensor; axes of position ids are not the samples."""
    positions = change(prompt.positions.movedim(-2, 0)).movedim(0, -2)
    ids, visual, embeds, mask = (change(part) for part in (prompt.ids, prompt.visual, prompt.embeds, prompt.mask))
    found = DecoderPrompt.of(prompt.arguments, 1, ids, visual, embeds, mask, positions, change(prompt.is_prompt))
    # Samples may have fewer tokens than the largest of the batch that they were in.
    features = tuple(change(part)[:, : found.tokens.shape[1]] for part in prompt.deepstack)
    columns = {name: change(part) for name, part in prompt.by_column.items()}
    return replace(found, masks=_of_each_mask(prompt.masks, change), by_column=columns, deepstack=features)


def _of_each_mask(masks: Masks | None, change: Callable[[Tensor], Tensor]) -> Masks | None:
    if isinstance(masks, dict):
        return {name: change(mask) for name, mask in masks.items()}
    return None if masks is None else change(masks)
