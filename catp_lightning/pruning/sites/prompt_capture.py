"""Capture of a prompt's ids, mask and positions as the caller gave them, not as the model's outer code changed them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from catp_lightning.errors import PruningError
from catp_lightning.models.base import Family
from catp_lightning.prompt.call import CallTracker
from catp_lightning.prompt.masks import two_dimensional
from catp_lightning.prompt.prompt import DecoderPrompt
from catp_lightning.utils.hooks import hooked
from catp_lightning.utils.on_cpu import on_cpu, on_device, with_copy


class PromptCapture:
    """Capture of one model's prompts as they reach its decoder, or the encoder that reads them.

    Where `family.outer` is None, as in BLIP-2, whose generate never calls the model's forward, the embedding layer is
    the one place that sees ids; and the decoder gets the caller's own mask and positions.

    Args:
        family: the model's family.
        calls: tracker of the model's calls.
    """

    def __init__(self, family: Family, calls: CallTracker) -> None:
        self.family, self.calls = family, calls
        self._outer = family.outer
        self._known: DecoderPrompt | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the model's calls while inside; hooks are in place only there."""
        with ExitStack() as undo:
            undo.enter_context(self.calls.watching())
            if self._outer is None:
                undo.enter_context(hooked(self.family.model.get_input_embeddings(), self._see_ids))
            yield

    @contextmanager
    def knowing(self, prompt: DecoderPrompt) -> Iterator[None]:
        """Return `prompt`, which is answered again, whatever the language model is called with while inside."""
        self._known = prompt
        try:
            yield
        finally:
            self._known = None

    def _see_ids(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.calls.in_decoder and args and args[0].dim() == 2:
            self.calls.user_call.ids = args[0]

    def _take_ids(self) -> Tensor | None:
        """Return the ids of the running call; those that an embedding layer saw are returned once."""
        if self._outer is not None:
            return self.calls.arguments.get("input_ids")
        call = self.calls.user_call
        ids, call.ids = call.ids, None
        return ids

    def _new_ids(self, kwargs: dict[str, Any]) -> Tensor | None:
        """Return the ids of the columns that the decoder's call adds to a cache; None if they are not known."""
        ids, own = self._take_ids(), kwargs.get("inputs_embeds")
        own = kwargs.get("input_ids") if own is None else own
        return ids if ids is None or own is None else ids[:, -own.shape[1] :]

    def _is_image(self, ids: Tensor) -> bool:
        """Return True if there are placeholders of images among ids that are added to a cache.

        A token that `generate` makes or drafts while it runs may be such an id, but has no image.
        """
        if ids.shape[1] == 1:
            return False
        call = self.calls.user_call
        given = [value for name, value in self.calls.arguments.items() if name.startswith(("pixel_values", "mm_enc"))]
        given = [value for value in given if value is not None and len(value)]
        if call.begun and not given and call.get("prefill_chunk_size") is None:
            return False
        return bool(self._visual(on_cpu(ids)[0]).any())

    def refuse_images(self, kwargs: dict[str, Any]) -> None:
        """Raise PruningError if the call that continues a cache brings an image.

        Args:
            kwargs: arguments of the decoder's call.
        """
        ids = self._new_ids(kwargs)
        if ids is not None and self._is_image(ids):
            raise PruningError(
                "An image came with a cache that holds the text before it, and would be read unpruned. Generate from "
                "the whole text again, with all of its images and without a cache."
            )

    def _visual(self, ids: Tensor) -> Tensor:
        """Return where ids on the CPU, int64 [B, L], are placeholders: bool [B, L]."""
        return torch.isin(ids, torch.tensor(self.family.placeholder_ids, device="cpu", dtype=torch.int64))

    def mask(self, kwargs: dict[str, Any], rows: int, length: int, device: torch.device) -> Tensor:
        """Return the caller's attention mask of all columns read so far, int64 [R, L]; ones if there is none.

        Args:
            kwargs: arguments of the decoder's call.
            rows: number of its rows.
            length: number of columns.
            device: device of the mask.

        Raises:
            PruningError: the mask has another shape.
        """
        mask = (kwargs if self._outer is None else self.calls.arguments).get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) != rows and rows % len(mask) == 0:
            mask = mask.repeat_interleave(rows // len(mask), 0)
        return two_dimensional(mask, rows, length, device)

    def step_positions(self, kwargs: dict[str, Any], mask: Tensor, new: int) -> Tensor:
        """Return position ids of the last `new` columns, [R, new] or [3, R, new]: the caller's, or the model's own.

        Args:
            kwargs: arguments of the decoder's call.
            mask: int64 [R, L], of all columns read so far.
            new: number of the call's own columns.
        """
        given = kwargs.get("position_ids")
        if given is None:
            return self.family.positions(mask, mask.shape[1] - new)
        last: Tensor = given if given.shape[-1] == new else given[..., -new:]
        return last

    def take(self, kwargs: dict[str, Any], past: int = 0) -> DecoderPrompt | None:
        """Return the prompt with which the decoder is called; None if it is called on text ids of its own.

        Args:
            kwargs: arguments of the decoder's call.
            past: number of columns that were read before, into the cache that the call continues. Then the prompt is
                of the call's own columns; it is None if there is no image among them.

        Raises:
            PruningError: the prompt's ids are not known, or it has no place for images that were given.
        """
        if self._known is not None:
            return self._known
        ids = self._new_ids(kwargs) if past else self._take_ids()
        embeds = kwargs.get("inputs_embeds")
        if past and (ids is None or not self._is_image(ids)):
            return None
        if embeds is None:
            return None
        rows, length = embeds.shape[:2]
        if ids is None or ids.shape[1] != length or rows % len(ids):
            raise PruningError(
                "The prompt reached the language model without its token ids, so its visual tokens cannot be found. "
                "Pass input_ids (and pixel_values), not inputs_embeds."
            )
        if past:
            self._refuse_parts()
        ids = ids[:: self.calls.rows_per_sample(len(ids))].to(embeds.device)
        mask = self.mask(kwargs, rows, past + length, embeds.device)
        positions = kwargs.get("position_ids")
        positions = self.family.positions(mask, past) if positions is None else positions.to(embeds.device)
        if positions.shape[-1] != length:
            raise PruningError(
                f"{type(self.family.model).__name__} made position ids of {positions.shape[-1]} columns for the "
                f"{length} that an image came with: they would be those of text. Pass position_ids of the new columns."
            )
        positions = positions.expand(*positions.shape[:-2], rows, length)
        beams, call, labels = rows // len(ids), self.calls.user_call, self.calls.outermost.get("labels")
        own_ids, own_mask, *own_labels = call.read(ids, mask[:, past:], *([] if labels is None else [labels]))
        for own in own_labels:
            self.calls.outermost.know("labels", own)
        ids, mask = with_copy(ids[:], own_ids), with_copy(mask[:, past:], own_mask)  # not the caller's own tensors
        visual = self._visual(own_ids)
        self.family.check_images(visual, call)
        is_prompt = on_device(self._prompt_columns(own_mask[::beams] != 0), embeds.device)
        visual = on_device(visual, embeds.device)
        prompt = DecoderPrompt.of(call, beams, ids, visual, embeds, mask, positions, is_prompt)
        self.calls.taken()
        masks, deepstack = kwargs.get("attention_mask"), tuple(kwargs.get("deepstack_visual_embeds") or ())
        return replace(
            prompt,
            generating=self.family.reads == "decoder" and self.calls.prompt_length(is_prompt.shape[1]) is not None,
            masks=masks if isinstance(masks, dict) or (masks is not None and masks.dim() == 4) else None,
            by_column={name: kwargs[name] for name in self.family.by_column if kwargs.get(name) is not None},
            deepstack=deepstack,
        )

    def _refuse_parts(self) -> None:
        """Raise PruningError if the call that adds an image to a cache reads a part of it, or older images as well."""
        if self.calls.user_call.begun:
            raise PruningError(
                "generate reads this prompt in several parts, and an image is not in the first: it cannot be pruned as "
                "a whole. Leave prefill_chunk_size out."
            )
        if self._outer is None:
            raise PruningError(
                f"{type(self.family.model).__name__} reads the images of the whole text again at every turn, so those "
                "of the new one cannot be told apart from those in the cache. Generate from the whole text "
                "again, without a cache."
            )

    def _prompt_columns(self, real: Tensor) -> Tensor:
        """Return the columns of the prompt itself, bool [B, L], without an answer, generated or with labels.

        Args:
            real: bool [B, L], on the CPU, columns that are no padding; changed in place.
        """
        length, labels = self.calls.prompt_length(real.shape[1]), self.calls.outermost.get("labels")
        if length is not None:
            real[:, length:] = False
        if labels is not None and self.family.reads == "decoder":  # an encoder reads no answer
            real[:, -labels.shape[1] :] &= (self.calls.outermost.on_cpu("labels") != -100).cumsum(1) == 0
        return real
