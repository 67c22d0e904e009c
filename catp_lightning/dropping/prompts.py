"""Finding a prompt's ids, mask and positions: what the caller gave, not what the model's outer code made of it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from catp_lightning.dropping.masks import two_dimensional
from catp_lightning.dropping.prompt import DecoderPrompt
from catp_lightning.dropping.watching import CallTracker
from catp_lightning.errors import PruningError
from catp_lightning.families.base import Family
from catp_lightning.hooks import hooked


class PromptCapture:
    """Prompts of one model, as they reach its decoder (or the encoder that reads them).

    Where `family.outer` is None, as in BLIP-2, whose generate never calls the model's forward, the embedding layer is
    the one place that sees ids; and the decoder gets the caller's own mask and positions.

    Attributes:
        inside: whether the decoder is running; what its embedding layer sees then is no prompt.
        given: a prompt that is known already, whatever the decoder is called with: it is answered again.
    """

    given: DecoderPrompt | None = None

    def __init__(self, family: Family) -> None:
        self.family = family
        self._watching = CallTracker(family.model, family.outer or family.model)
        # Labels are seen at the outermost model only.
        self._calls = self._watching if family.outer is None else CallTracker(family.model, family.model)
        self._ids: Tensor | None = None

    @property
    def inside(self) -> bool:
        return self._watching.in_decoder

    @inside.setter
    def inside(self, running: bool) -> None:
        self._watching.in_decoder = running

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as undo:
            undo.enter_context(self._watching.watching())
            if self.family.outer is not None:
                undo.enter_context(self._calls.watching())
            else:
                embeddings = self.family.model.get_input_embeddings()
                undo.enter_context(hooked(embeddings, self._see_ids))
            yield

    def _see_ids(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.inside and args and args[0].dim() == 2:
            self._ids = args[0]

    def forget(self) -> None:
        """The call that is running has failed: what was seen of it must not serve another."""
        self._ids = None

    def refuse_images(self) -> None:
        """Raise PruningError where the call that continues a cache brings an image."""
        ids, self._ids = (self._ids if self.family.outer is None else self._watching.arguments.get("input_ids")), None
        if ids is not None and ids.shape[1] > 1 and bool(self._visual(ids).any()):
            raise PruningError(
                "An image came with a cache that holds the text before it, and would be read unpruned. Generate from "
                "the whole text again, with all of its images and without past_key_values."
            )

    def refuse_continuing(self) -> None:
        """Raise PruningError where the `generate` that is running was given the cache of a pruned prompt."""
        if self._watching.continuing:
            raise PruningError(
                "generate was given past_key_values that hold a pruned prompt, and takes their length for the number "
                "of columns that have been read: it would read some again. Generate from the whole text again, with "
                "all of its images and without past_key_values."
            )

    def _visual(self, ids: Tensor) -> Tensor:
        return torch.isin(ids, torch.tensor(self.family.placeholder_ids, device=ids.device, dtype=torch.int64))

    def mask(self, kwargs: dict[str, Any]) -> Any:
        """The caller's mask, given what the decoder is called with."""
        return (kwargs if self.family.outer is None else self._watching.arguments).get("attention_mask")

    def positions(self, kwargs: dict[str, Any]) -> Tensor | None:
        """The position ids the decoder is called with, if the caller gave any: others were read from a short cache."""
        if self.family.outer is not None and self._watching.arguments.get("position_ids") is None:
            return None
        return kwargs.get("position_ids")

    def take(self, kwargs: dict[str, Any]) -> DecoderPrompt | None:
        """The prompt with which the decoder is called; None where it is called on text ids of its own.

        Raises:
            PruningError: its ids are not known, or images were given that it has no place for.
        """
        if self.given is not None:
            return self.given
        ids, self._ids = self._ids, None
        if self.family.outer is not None:
            ids = self._watching.arguments.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            return None
        rows, length = embeds.shape[:2]
        if ids is None or ids.shape[1] != length or rows % len(ids):
            raise PruningError(
                "The prompt reached the language model without its token ids, so its visual tokens cannot be found. "
                "Pass input_ids (and pixel_values), not inputs_embeds; chunked prefill and assisted decoding cannot be "
                "pruned."
            )
        ids = ids[:: self._watching.beams(len(ids))].to(embeds.device)
        mask = self.mask(kwargs)
        if isinstance(mask, Tensor) and mask.dim() == 2 and rows % len(mask) == 0:
            mask = mask.repeat_interleave(rows // len(mask), 0)
        mask = two_dimensional(mask, rows, length, embeds.device)
        positions = kwargs.get("position_ids")
        positions = self.family.positions(mask) if positions is None else positions.to(embeds.device)
        positions = positions.expand(*positions.shape[:-2], rows, length)
        beams, visual = rows // len(ids), self._visual(ids)
        self.family.check_images(visual, self._watching.given)
        is_prompt = self._asks(mask[::beams] != 0)
        prompt = DecoderPrompt.of(self._watching.given, beams, ids, visual, embeds, mask, positions, is_prompt)
        generating = self.family.reads == "decoder" and self._calls.prompt_length(is_prompt.shape[1]) is not None
        return replace(prompt, generating=generating)

    def _asks(self, real: Tensor) -> Tensor:
        """Of rows that are no padding, bool [B, L], those of the prompt itself."""
        length, labels = self._calls.prompt_length(real.shape[1]), self._calls.arguments.get("labels")
        if length is not None:
            real[:, length:] = False
        if labels is not None and self.family.reads == "decoder":  # an encoder reads no answer
            real[:, -labels.shape[1] :] &= (labels.to(real.device) != -100).cumsum(1) == 0
        return real
