"""Guide: a small model run on the prompts of a large one, to see what text and answer attend to in the images."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import StoppingCriteria, StoppingCriteriaList

from catp_lightning.errors import PruningError
from catp_lightning.methods.observation import Observation, Signal
from catp_lightning.methods.precision import without_autocast
from catp_lightning.models import Family, find_family
from catp_lightning.prompt.attention import attention_map, observe_attention
from catp_lightning.prompt.caches import CACHE_NAMES
from catp_lightning.prompt.prompt import DecoderPrompt, Prompt, visual_tokens
from catp_lightning.pruning.refusals import occupied
from catp_lightning.utils.signatures import parameters_of

TYPES = ("token_type_ids", "mm_token_type_ids")  # inputs with a number for each column of the prompt
NOT_IMAGES = {
    *("input_ids", "attention_mask", "position_ids", "inputs_embeds", "labels", "cache_position"),
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "logits_to_keep", "mm_encoder_outputs"),
    *TYPES,
    *CACHE_NAMES,
}


class Guide:
    """Small model whose attention guides the pruning of a large one.

    It is what it was after every prompt, also where that fails.

    Args:
        module: a small model of the same kind, tokeniser and grid, or a module that holds one.
        family: family of the large model.
        layers: layers of the guide to observe, counted from 0, or from -1 for the last; None: all.
        answer_tokens: largest number of tokens that the guide generates.

    Raises:
        PruningError: the guide does not fit the large model.
    """

    def __init__(self, module: nn.Module, family: Family, layers: tuple[int, ...] | None, answer_tokens: int) -> None:
        self.family, self.answer_tokens = find_family(module), answer_tokens
        _refuse_other(self.family, family)
        blocks: list[Any] = list(self.family.decoder.get_submodule("layers").children())
        self.depth = len(blocks)
        for layer in layers or ():
            if not -self.depth <= layer < self.depth:
                raise PruningError(
                    f"The policy reads layer {layer} of the guide; {type(self.family.model).__name__} has "
                    f"{self.depth}, numbered 0 to {self.depth - 1}. Name layers it has, or None for all."
                )
        read = range(self.depth) if layers is None else sorted({layer % self.depth for layer in layers})
        if lacking := [layer for layer in read if not hasattr(blocks[layer], "self_attn")]:
            raise PruningError(
                f"The policy reads the attention of every layer of the guide, or of those that it names, and layers "
                f"{lacking} of {type(self.family.model).__name__} have none: they are recurrent. Name layers that have "
                "attention (scorer_args, layers), or choose another scorer; docs/methods.md lists them."
            )
        self._attentions: dict[int, nn.Module] = {layer: blocks[layer].self_attn for layer in read}

    def add(self, seen: Observation, prompt: Prompt) -> Observation:
        """Return the signals of the large model with `Signal.GUIDE_ATTENTION` added.

        Raises:
            PruningError: the guide cannot read the prompt.
        """
        call = prompt.arguments
        if not call.guide:  # not computed again in a step without a cache: the choice belongs to the prompt
            call.guide = self._read(cast(DecoderPrompt, prompt))
        by_layer, values = call.guide, dict(seen.values)
        for layer, paid in by_layer.items():
            flat = paid.transpose(1, 2)[prompt.tokens]  # all visual tokens, in the order of their placeholders
            of_images = flat.new_zeros(*seen.valid.shape, flat.shape[-1])
            of_images[seen.valid] = flat
            values[Signal.GUIDE_ATTENTION, layer] = of_images.transpose(1, 2)
        return replace(seen, layers={**seen.layers, Signal.GUIDE_ATTENTION: self.depth}, values=values)

    def _read(self, prompt: DecoderPrompt) -> dict[int, Tensor]:
        """Return the attention that text pays to each visual token in the guide, by layer: [B, H, T]."""
        model: Any = self.family.model
        order, real = _prompt_alone(prompt)
        visual, ids = (part.gather(1, order) for part in (prompt.visual, prompt.ids))
        columns, valid = prompt.text_columns()
        text = torch.zeros_like(prompt.visual).scatter(1, columns, valid).gather(1, order)
        padding = self.family.generation_config.pad_token_id or 0
        inputs = {"input_ids": ids.masked_fill(~real, padding), "attention_mask": real.long(), **self._images(prompt)}
        for name in TYPES:
            types = prompt.arguments.get(name)
            if types is not None and types.shape == prompt.ids.shape:
                inputs[name] = types.to(order.device).gather(1, order).masked_fill(~real, 0)
        cap = getattr(self.family.decoder_config, "attn_logit_softcapping", None)
        sight = _GuideAttention(visual.to(model.device), text.to(model.device), self.family.end_ids(), cap)
        modules = {module: (partial(sight.look, layer), _nothing) for layer, module in self._attentions.items()}
        decoder: Any = self.family.decoder
        with occupied(self.family), _evaluating(model), observe_attention(decoder, modules):
            try:
                model.generate(
                    **{name: self._moved(value) for name, value in inputs.items()},
                    do_sample=False,
                    num_beams=1,
                    num_return_sequences=1,
                    use_cache=True,
                    cache_implementation="dynamic",
                    max_new_tokens=self.answer_tokens,
                    stopping_criteria=StoppingCriteriaList([sight]),
                )
            except ValueError as error:
                raise PruningError(
                    f"The guide {type(model).__name__} cannot read this prompt: {error}. A guide needs as many visual "
                    "tokens an image as the model it guides: take one of the same kind, image size and patch size."
                ) from error
        return {layer: value.to(prompt.tokens.device) for layer, value in sight.values.items()}

    def _images(self, prompt: DecoderPrompt) -> Mapping[str, Any]:
        """Return the arguments of the large model's call, beside its text, that the guide takes too."""
        taken = set(parameters_of(self.family.model.forward)) - NOT_IMAGES
        return {name: value for name, value in prompt.arguments.items() if name in taken and value is not None}

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        model = self.family.model
        return value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)


class _GuideAttention(StoppingCriteria):
    """Sum of the attention that text rows pay to visual tokens, over a prefill and the steps after it.

    It is a stopping criterion in order to see the generated tokens, and stops nothing.

    Args:
        visual: bool [B, L], the visual tokens of the prompt.
        text: bool [B, L], text rows of the prompt that count.
        ends: token ids that end an answer: no row counts from there on.
        cap: bound of the guide's attention logits, as in `attention_map`.

    Attributes:
        values: by layer [B, H, T], float32 at least.
    """

    def __init__(self, visual: Tensor, text: Tensor, ends: list[int], cap: float | None) -> None:
        self.visual, self.text, self.tokens, self.cap = visual, text, visual_tokens(visual), cap
        self.ends = torch.tensor(ends, dtype=torch.long, device=visual.device)
        self.answering = torch.ones(len(visual), dtype=torch.bool, device=visual.device)
        self.values: dict[int, Tensor] = {}
        self._columns: dict[int, int] = {}  # number of columns that each layer has read

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.answering &= ~torch.isin(input_ids[:, -1], self.ends)
        return torch.zeros_like(self.answering)

    def look(self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Add up the attention of a layer's call, as an `attention.Reduction` with an empty result.

        The first call of a layer has the prompt's rows, each later one a single row.
        """
        columns = self._columns[layer] = self._columns.get(layer, 0) + query.shape[2]
        first = layer not in self.values
        rows = self.text if first else self.answering[:, None]
        with without_autocast(query):
            paid = rows_paid(query, key, mask, scaling, rows, self.cap)
        paid = pad(paid, (columns - paid.shape[2], 0))[..., : self.visual.shape[1]]  # a sliding window lacks the first
        own = paid.new_zeros(*self.tokens.shape, paid.shape[1])
        own[self.tokens] = paid.transpose(1, 2)[self.visual]
        self.values[layer] = own.transpose(1, 2) + (0 if first else self.values[layer])
        return query.new_empty(0)


def rows_paid(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, rows: Tensor, cap: float | None = None
) -> Tensor:
    """Return the attention that chosen query rows pay to each key, summed over the rows: [B, H, N].

    Args:
        query, key, mask, scaling: as of an `attention.Reduction`.
        rows: bool [B, Q], the query rows that count.
        cap: bound of attention logits, as in `attention_map`.
    """
    at = (~rows).long().argsort(dim=1, stable=True)[:, : int(rows.sum(1).max())]
    each = torch.arange(len(rows), device=rows.device)[:, None]
    keys, batch = key.shape[2], len(query)
    if mask is not None and mask.dim() == 4:
        seen = mask[..., :keys].expand(batch, -1, query.shape[2], -1).transpose(1, 2)[each, at].transpose(1, 2)
    else:  # the mask of flash attention, or none
        causal = torch.arange(keys, device=at.device) <= at[..., None] + keys - query.shape[2]
        seen = (causal if mask is None else causal & mask[:, None, -keys:].bool())[:, None]
    some = query.transpose(1, 2)[each, at].transpose(1, 2)
    paid = attention_map(some, key.repeat_interleave(query.shape[1] // key.shape[1], 1), seen, scaling, cap)
    return paid.masked_fill(~rows.gather(1, at)[:, None, :, None], 0).sum(2)  # padding sees nothing: its row is NaN


def _prompt_alone(prompt: DecoderPrompt) -> tuple[Tensor, Tensor]:
    """Return the columns of the prompt itself, without the answer, int64 [B, n], and which are no padding, bool [B, n].

    Padding is on the left. Placeholders of images in the answer stay: the images are read all the same.
    """
    own = prompt.is_prompt | prompt.visual
    real = prompt.mask[:: prompt.rows_per_sample] != 0
    own |= ~own.any(1, keepdim=True) & real & (real.cumsum(1) == 1)  # an empty prompt: one row has to be read
    max_tokens = int(own.sum(1).max())
    order = own.long().argsort(dim=1, stable=True)[:, -max_tokens:]
    return order, own.gather(1, order)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode while inside; afterwards every module has the mode that it had."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def refuse_without_rows(family: Family) -> None:
    """Raise PruningError if no decoder of the model reads visual tokens as rows of its own."""
    if family.reads != "decoder":
        raise PruningError(
            "A guide ranks visual tokens by the attention of a decoder that reads them as rows; "
            f"{type(family.model).__name__} reads them by {family.reads}. Choose another scorer; docs/methods.md lists "
            "them."
        )


def _refuse_other(guide: Family, family: Family) -> None:
    """Raise PruningError if the guide's attention says nothing about the visual tokens of the large model."""
    small, large = type(guide.model).__name__, type(family.model).__name__
    refuse_without_rows(guide)
    if set(guide.model.modules()) & set(family.model.modules()):
        raise PruningError("The guide is, or shares modules with, the model that is pruned: give a model of its own.")
    for what, one, other in (
        ("a vocabulary of {} tokens", guide.decoder_config.vocab_size, family.decoder_config.vocab_size),
        ("image tokens of id {}", guide.placeholder_ids, family.placeholder_ids),
        ("{} visual tokens an image", guide.tokens_per_image, family.tokens_per_image),
    ):
        if one != other:
            raise PruningError(
                f"The guide {small} has {what.format(one)}, the model {large} {other}. A guide reads the same prompt: "
                "take a smaller model of the same kind with the same tokeniser and the same grid of visual tokens."
            )


def _nothing(value: Tensor) -> None:
    """No-op: the accumulator has already consumed the attention."""
