"""Replay of prompts whose text reads image rows by cross-attention: Llama-3.2-Vision."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, cast

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
from catp_lightning.errors import PruningError
from catp_lightning.methods.selection import Selection
from catp_lightning.models import Family
from catp_lightning.models.mllama import Mllama
from catp_lightning.prompt.prompt import CrossAttended
from catp_lightning.pruning.answers import Answer
from catp_lightning.pruning.sites import PruneCrossAttention
from catp_lightning.pruning.sites.image_rows import SharedImages

BY_TEXT = ("cross_attention_mask", "full_text_row_masked_out_mask")  # [B, 1, L text rows, n]
BY_ROW = ("attention_mask", "cross_attention_states", *BY_TEXT)


@dataclass(frozen=True)
class CrossAttentionReplay(Replay):
    """Replay of a batch of prompts as the text model received them.

    Attributes:
        seen: image rows that each text sees: bool [B, T].
        arguments: arguments of the text model by name, with B rows each.
        shared: the images, if each layer's keys and values of them are to be made once; None: anew for every prompt.
    """

    sites = (PruneCrossAttention,)

    seen: Tensor
    arguments: Mapping[str, Tensor]
    shared: SharedImages | None = None

    @classmethod
    def of(cls, family: Family, prompt: CrossAttended, answers: Answer, layer: int = 0) -> "CrossAttentionReplay":
        text = prompt.text_arguments
        ids, positions = text.get("input_ids"), text.get("position_ids")
        if ids is None:
            raise PruningError("Calibration answers prompts again from their ids: pass input_ids, not inputs_embeds.")
        arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        arguments |= {name: text[name] for name in BY_ROW if text.get(name) is not None}
        columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        arguments["position_ids"] = columns if positions is None else positions.expand_as(ids)
        states = arguments["cross_attention_states"]
        arguments["cross_attention_states"] = states.reshape(len(ids), -1, states.shape[-1])  # from one entry per tile
        arguments = {name: value[:: prompt.rows_per_sample] for name, value in arguments.items()}
        first, rows = first_answers(answers, len(prompt.tokens), family.decoder_config.vocab_size)
        return cls(family, first, rows, prompt.tokens, arguments)

    @property
    def tokens(self) -> Tensor:
        return self.seen

    @property
    def lengths(self) -> Tensor:
        # By text first, whose rows pass through every layer, and then by the image rows that are read.
        return self.arguments["attention_mask"].sum(1) * self.seen.shape[1]

    @property
    def sizes(self) -> Tensor:
        real, tokens = self.arguments["attention_mask"] > 0, self.seen.sum(1)
        text, sees = real.sum(1), (self.arguments["full_text_row_masked_out_mask"][:, 0, :, 0] > 0) & real
        rows = torch.full_like(tokens, self.arguments["cross_attention_states"].shape[1])
        return torch.stack([text, tokens, rows, text - sees.sum(1)], 1)

    @property
    def questions(self) -> Tensor:
        return text_fingerprint(self.arguments["input_ids"], self.arguments["attention_mask"] == 1)

    @property
    def text_ids(self) -> Tensor:
        ids, family = self.arguments["input_ids"], cast(Mllama, self.family)
        sees = self.arguments["full_text_row_masked_out_mask"][:, 0, :, 0] > 0
        text = sees & (self.arguments["attention_mask"] == 1) & (ids != family.model.config.image_token_id)
        order = (~text).long().argsort(dim=1, stable=True)
        return ids.where(text, -1).gather(1, order)[:, : int(text.sum(1).max())]

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        arguments = {name: change(value) for name, value in self.arguments.items()}
        answers = changed_answers(self.answers, change)
        shared = None if self.shared is None else self.shared.each(change)
        return replace(self, seen=change(self.seen), arguments=arguments, answers=answers, shared=shared)

    def prepared(self) -> Self:
        return replace(self, shared=SharedImages.of(self.arguments["cross_attention_states"]))

    def log_probabilities(self, keep: Tensor, destination: Tensor | None = None) -> Tensor:
        assert destination is None  # selectors that merge are refused here
        return self._without_padding()._log_probabilities(keep)

    def _without_padding(self) -> Self:
        """Return the replay without the columns on the left that are padding in every prompt."""
        padding = int((self.arguments["attention_mask"].cumsum(1) == 0).all(0).sum())
        arguments = {
            name: value[:, :, padding:] if name in BY_TEXT else value[:, padding:]
            for name, value in self.arguments.items()
            if name != "cross_attention_states"
        }
        answers = replace(self.answers, row=self.answers.row - padding)
        return replace(self, arguments={**self.arguments, **arguments}, answers=answers)

    def _log_probabilities(self, keep: Tensor) -> Tensor:
        family, length = cast(Mllama, self.family), self.arguments["input_ids"].shape[1]
        site = PruneCrossAttention(family, lambda prompt: Selection(keep))
        site.prompt_length, site.shared = length, self.shared
        needed, place = answering_rows(self.answers, self.answers.row[:, None], length)
        with site.installed():
            hidden = family.decoder(**self._forced(), use_cache=False).last_hidden_state
        return picked(family.model.lm_head(hidden[:, needed]), place)

    def _forced(self) -> dict[str, Any]:
        """Return the text model's arguments for prompt and answer; answers see what the prompt's last token sees."""
        forced, arguments = self.answers.ids[:, :-1], self.arguments
        positions = arguments["position_ids"]
        steps = torch.arange(1, forced.shape[1] + 1, device=forced.device)
        real = arguments["attention_mask"]
        last = real.shape[1] - 1 - real.flip(1).argmax(1)

        def extended(name: str) -> Tensor:
            """Extend an argument [B, 1, L, n] over the answer: the row of the prompt's last token is repeated."""
            value = arguments[name]
            end = value[torch.arange(len(value), device=value.device), :, last][:, :, None]
            return torch.cat([value, end.expand(-1, -1, forced.shape[1], -1)], 2)

        return {
            "input_ids": torch.cat([arguments["input_ids"], forced], 1),
            "attention_mask": torch.cat([real, torch.ones_like(forced)], 1),
            "position_ids": torch.cat([positions, positions.amax(1, keepdim=True) + steps], 1),
            "cross_attention_states": arguments["cross_attention_states"],
            "cross_attention_mask": extended("cross_attention_mask"),
            "full_text_row_masked_out_mask": extended("full_text_row_masked_out_mask"),
        }
