"""Oracles of dropping: the unpruned model with the same tokens hidden, or run on a prompt physically shortened.

Nothing of the package is used here: an oracle that shares code with what it judges shares its faults.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

PAD, IMAGE, VIDEO, START, END = 0, 110, 111, 112, 113
Inputs = dict[str, Tensor]


def visual_columns(inputs: Inputs) -> Tensor:
    """Return the columns of placeholders, bool [B, L]."""
    return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)


def columns_kept(inputs: Inputs, keep: Tensor) -> Tensor:
    """Return the columns of a prompt that stay, bool [B, L]: visual tokens by keep, bool [B, T], and all text."""
    columns = ~visual_columns(inputs)
    for row, visual in enumerate(visual_columns(inputs)):
        columns[row, visual] = keep[row, : visual.sum()]
    return columns


def hidden_in(mask: Tensor, hidden: Tensor) -> Tensor:
    """Return an attention mask, boolean or additive, under which `hidden` keys are not seen either."""
    return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def of_rows(values: Tensor, rows: int) -> Tensor:
    """Repeat values of samples for `rows` rows, in which the beams of a sample lie next to each other."""
    return values.repeat_interleave(rows // len(values), 0)


def cache_of(output: Any) -> Any:
    return output.get("language_model_outputs", output).past_key_values


@contextmanager
def hooked(modules: list[nn.Module], change: Any) -> Iterator[None]:
    """Context in which `change(module, args, kwargs)` may return other keyword arguments for a call of `modules`."""
    with ExitStack() as undo:
        for module in modules:

            def pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                return args, {**kwargs, **change(module, args, kwargs)}

            undo.callback(module.register_forward_pre_hook(pre_hook, with_kwargs=True).remove)
        yield


class Oracle(ABC):
    """Reference for a kind of model, which is run with tokens hidden, step by step, and on a shortened prompt.

    Shapes: B samples, L columns of a prompt, T visual tokens, n generated tokens, V vocabulary.
    """

    first_type = 0  # type of a generated token, where tokens have types

    @abstractmethod
    def masked(self, model: PreTrainedModel, inputs: Inputs, keep: Tensor) -> Any:
        """Context in which `model` reads its prompt (`inputs`, or the result of `grow`) with dropped tokens hidden."""

    @abstractmethod
    def compact(self, model: PreTrainedModel, inputs: Inputs, tokens: Tensor, keep: Tensor) -> Tensor:
        """Return logits [n, V] that predict `tokens`, int64 [1, n], of one unpadded sample, physically shortened."""

    @abstractmethod
    def loop(self, model: PreTrainedModel, inputs: Inputs, tokens: Tensor, with_positions: bool) -> Iterator[Tensor]:
        """Decode by hand with a cache and yield at each step logits [B, V] that predict `tokens`, int64 [B, n]."""

    def positions(self, mask: Tensor) -> Inputs:
        """Return position ids as generate makes them from the mask, int64 [B, L], of a prompt and tokens after it."""
        return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

    @abstractmethod
    def cached(self, output: Any) -> int:
        """Return the number of rows of a prompt in the cache of a model's output, where visual tokens are cached."""

    def stored(self, inputs: Inputs, keep: Tensor) -> int:
        """Return the number of a prompt's rows that the cache should hold.

        Padding on the left counts by its last column only, or the longest sample would decide.
        """
        lengths = []
        for columns, mask in zip(columns_kept(inputs, keep), inputs["attention_mask"], strict=True):
            lengths.append(int(columns[max(int(mask.argmax()) - 1, 0) :].sum()))
        return max(lengths)

    @abstractmethod
    def inside(self, model: PreTrainedModel) -> nn.Module:
        """Return a layer of the language model, after the place where tokens leave."""

    def tokens(self, inputs: Inputs) -> Tensor:
        """Return the visual tokens that each sample has: bool [B, T]."""
        counts = visual_columns(inputs).sum(1, keepdim=True)
        return torch.arange(int(counts.max())) < counts

    def forward_inputs(self, inputs: Inputs) -> Inputs:
        """Return the arguments that the model's forward takes for the same prompt."""
        return inputs

    def compared(self, inputs: Inputs, keep: Tensor) -> Tensor:
        """Return the rows of logits that dropping must not change: bool [B, rows]."""
        return columns_kept(inputs, keep) & inputs["attention_mask"].bool()

    def left_out(self, inputs: Inputs, labels: Tensor, keep: Tensor) -> Tensor:
        """Return the labels that are predicted from dropped rows: bool, of the shape of `labels`."""
        gone = torch.zeros_like(labels, dtype=torch.bool)
        gone[:, 1:] = ~columns_kept(inputs, keep)[:, :-1] & (labels[:, 1:] != -100)
        return gone

    def labels(self, inputs: Inputs) -> Tensor:
        """Return random labels over text and images alike, and -100 over padding."""
        words = torch.randint(3, 90, inputs["input_ids"].shape, generator=torch.Generator().manual_seed(5))
        return words.masked_fill(inputs["attention_mask"] == 0, -100)

    def grow(self, inputs: Inputs, tokens: Tensor) -> Inputs:
        """Return the prompt with generated tokens, int64 [B, n], after it, to be read without a cache."""
        ones = torch.ones_like(tokens)
        more = {
            "input_ids": tokens,
            "attention_mask": ones,
            "token_type_ids": self.first_type * ones,
            "mm_token_type_ids": 0 * ones,
        }
        grown = {name: torch.cat([inputs[name], last], 1) for name, last in more.items() if name in inputs}
        return {**inputs, **grown}


@dataclass(frozen=True)
class Decoder(Oracle):
    """Oracle for models that put visual tokens into placeholders of a decoder's prompt.

    Attributes:
        path: path of the stack of decoder layers.
        stepper: path of the part that is called for one more token; "": the model.
        first_position: position of a prompt's first token.
        first_type: type of a generated token, where tokens have types.
        coordinates: True if position ids have axes (multimodal rotary positions).
    """

    path: str = "model.language_model"
    stepper: str = ""
    first_position: int = 0
    first_type: int = 0
    coordinates: bool = False

    def cached(self, output: Any) -> int:
        return int(cache_of(output).get_seq_length())

    def inside(self, model: PreTrainedModel) -> nn.Module:
        return model.get_submodule(self.path).layers[1]

    @contextmanager
    def masked(self, model: PreTrainedModel, inputs: Inputs, keep: Tensor) -> Iterator[None]:
        columns = columns_kept(inputs, keep)
        layers = list(model.get_submodule(self.path).layers)

        def hide(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            rows, queries = hidden_states.shape[:2]
            cache = kwargs.get("past_key_values")
            length = queries + (0 if cache is None else cache.get_seq_length(layers.index(layer)))
            mask = kwargs["attention_mask"]
            if mask is None:  # causal, and nothing is padding
                mask = torch.ones(1, 1, queries, length, dtype=torch.bool).tril(length - queries)
            gone = torch.zeros(rows, length, dtype=torch.bool)
            gone[:, : columns.shape[1]] = ~of_rows(columns, rows)
            keys = torch.arange(length - mask.shape[-1], length)  # a sliding layer's cache holds the last columns
            others = torch.arange(length - queries, length)[:, None] != keys  # no row is left with nothing to see
            return {"attention_mask": hidden_in(mask, gone[:, None, None, keys] & others)}

        with hooked(layers, hide):
            yield

    def compact(self, model: PreTrainedModel, inputs: Inputs, tokens: Tensor, keep: Tensor) -> Tensor:
        stack, n = model.get_submodule(self.path), tokens.shape[1]
        grown = self.grow(inputs, tokens[:, :-1])
        columns = torch.cat([columns_kept(inputs, keep), torch.ones(1, n - 1, dtype=torch.bool)], 1)[0].nonzero()[:, 0]
        seen: dict[str, Any] = {}
        with hooked([stack], lambda module, args, kwargs: seen.update(kwargs) or {}):
            model(**grown, use_cache=False)
        positions = seen.get("position_ids")
        length = grown["input_ids"].shape[1]
        positions = torch.arange(length)[None] + self.first_position if positions is None else positions
        output = stack(
            inputs_embeds=seen["inputs_embeds"][:, columns],
            attention_mask=self._shortened(seen.get("attention_mask"), columns, stack.config),
            position_ids=positions[:, columns] - (columns - torch.arange(len(columns))),
            use_cache=False,
        )
        return model.get_output_embeddings()(output.last_hidden_state)[0, -n:]

    def _shortened(self, mask: Any, columns: Tensor, config: Any) -> Any:
        if isinstance(mask, dict):
            return {kind: self._shortened(one, columns, config) for kind, one in mask.items()}
        if isinstance(mask, Tensor) and mask.dim() == 4:
            return mask[:, :, columns][..., columns]
        window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
        if not window or (types and "sliding_attention" not in types):
            return None if mask is None else mask[:, columns]
        distance = columns[:, None] - columns  # windows are counted in the columns of the full prompt
        masks = {"full_attention": distance >= 0, "sliding_attention": (distance >= 0) & (distance < window)}
        masks = {kind: one[None, None] for kind, one in masks.items()}
        return masks if types else masks["sliding_attention"]

    def loop(self, model: PreTrainedModel, inputs: Inputs, tokens: Tensor, with_positions: bool) -> Iterator[Tensor]:
        mask, steps = inputs["attention_mask"], model.get_submodule(self.stepper)
        given = self.positions(mask) if with_positions else {}
        output = model(**inputs, **given, use_cache=True)
        yield output.logits[:, -1]
        cache = cache_of(output)
        for token in tokens[:, :-1].split(1, 1):
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            if with_positions:
                given = {"position_ids": self._counted(mask)[:, -1:]}
                if self.coordinates:
                    given["position_ids"] = (given["position_ids"] + model.model.rope_deltas).expand(3, -1, -1)
            output = steps(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True, **given)
            yield output.logits[:, -1]

    def positions(self, mask: Tensor) -> Inputs:
        return {} if self.coordinates else {"position_ids": self._counted(mask)}

    def _counted(self, mask: Tensor) -> Tensor:
        return (mask.cumsum(1) - 1).clamp(min=0) + self.first_position


class EncoderDecoder(Oracle):
    """Oracle for models whose visual tokens go to an encoder (T5), whose outputs a decoder reads."""

    def cached(self, output: Any) -> int:
        return int(cache_of(output).cross_attention_cache.get_seq_length())

    def inside(self, model: PreTrainedModel) -> nn.Module:
        return model.language_model.encoder.block[1]

    @contextmanager
    def masked(self, model: PreTrainedModel, inputs: Inputs, keep: Tensor) -> Iterator[None]:
        text, columns = model.language_model, columns_kept(inputs, keep)

        def hide(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
            name = "attention_mask" if module is text.encoder else "encoder_attention_mask"
            return {name: kwargs[name] * of_rows(columns, len(kwargs[name]))}

        with hooked([text.encoder, text.decoder], hide):
            yield

    def compact(self, model: PreTrainedModel, inputs: Inputs, tokens: Tensor, keep: Tensor) -> Tensor:
        seen: dict[str, Any] = {}
        with hooked([model.language_model.encoder], lambda module, args, kwargs: seen.update(kwargs) or {}):
            model(**self.forward_inputs(inputs))
        short = seen["inputs_embeds"][:, columns_kept(inputs, keep)[0]]
        start = tokens.new_full((1, 1), PAD)
        return model.language_model(
            inputs_embeds=short,
            attention_mask=torch.ones(short.shape[:2], dtype=torch.long),
            decoder_input_ids=torch.cat([start, tokens[:, :-1]], 1),
        ).logits[0]

    def loop(self, model: PreTrainedModel, inputs: Inputs, tokens: Tensor, with_positions: bool) -> Iterator[Tensor]:
        start = tokens.new_full((len(tokens), 1), PAD)
        output = model(**inputs, decoder_input_ids=start, use_cache=True)
        yield output.logits[:, -1]
        first = output.language_model_outputs
        encoded = BaseModelOutput(last_hidden_state=first.encoder_last_hidden_state)
        for token in tokens[:, :-1].split(1, 1):
            output = model.language_model(
                encoder_outputs=encoded,
                attention_mask=inputs["attention_mask"],
                decoder_input_ids=token,
                past_key_values=first.past_key_values,
                use_cache=True,
            )
            yield output.logits[:, -1]

    def positions(self, mask: Tensor) -> Inputs:
        return {}  # T5 has relative positions

    def forward_inputs(self, inputs: Inputs) -> Inputs:
        words = torch.tensor([[PAD, 5, 9, 17, 33]]).expand(len(inputs["input_ids"]), -1)
        return {**inputs, "decoder_input_ids": words}

    def compared(self, inputs: Inputs, keep: Tensor) -> Tensor:
        return torch.ones(len(keep), 5, dtype=torch.bool)

    def left_out(self, inputs: Inputs, labels: Tensor, keep: Tensor) -> Tensor:
        return torch.zeros_like(labels, dtype=torch.bool)  # the decoder predicts all labels

    def labels(self, inputs: Inputs) -> Tensor:
        return (
            super().labels({**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])})[:, -6:].contiguous()
        )

    def grow(self, inputs: Inputs, tokens: Tensor) -> Inputs:
        return {**inputs, "decoder_input_ids": torch.cat([tokens.new_full((len(tokens), 1), PAD), tokens], 1)}


class CrossAttention(Oracle):
    """Oracle for models whose text reads images by layers of cross-attention (Llama-3.2-Vision).

    A prompt's text sees every row in the first such layer, in later ones only rows that were kept; generated text sees
    only kept rows. Text that sees no image attends to all rows.
    """

    def cached(self, output: Any) -> int:
        return max(cache_of(output).layers[layer].keys.shape[2] for layer in (1, 3, 5))

    def stored(self, inputs: Inputs, keep: Tensor) -> int:
        """Return the number of rows that the cache should hold: kept ones, all if a sample's last text sees no image.

        Text that such a sample generates attends to every row.
        """
        last = inputs["cross_attention_mask"][:, -1].bool().flatten(1)
        rows = (keep & last.repeat_interleave(5, 1)).sum(1)
        return int(torch.where(last.any(1), rows, keep.shape[1]).max())

    def inside(self, model: PreTrainedModel) -> nn.Module:
        return model.model.language_model.layers[2]

    @contextmanager
    def masked(self, model: PreTrainedModel, inputs: Inputs, keep: Tensor) -> Iterator[None]:
        layers = [layer for layer in model.model.language_model.layers if hasattr(layer, "cross_attn")]
        prompt = inputs["input_ids"].shape[1]

        def hide(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
            mask, sees = kwargs["cross_attention_mask"], kwargs["full_text_row_masked_out_mask"].bool()
            past = kwargs["past_key_values"].get_seq_length() if kwargs.get("past_key_values") is not None else 0
            if layer is layers[0]:
                # Layer 0 of the model, which is no cross-attention layer, has run already: its cache holds this call.
                columns = torch.arange(mask.shape[2]) + max(past - mask.shape[2], 0)
                sees = sees & (columns >= prompt)[:, None]
            return {"cross_attention_mask": hidden_in(mask, ~of_rows(keep, len(mask))[:, None, None] & sees)}

        with hooked(layers, hide):
            yield

    def tokens(self, inputs: Inputs) -> Tensor:
        """Return the rows that some text sees, bool [B, T]: five in each tile, its [CLS] first."""
        seen = inputs["cross_attention_mask"].bool() & inputs["attention_mask"].bool()[:, :, None, None]
        return seen.any(1).flatten(1).repeat_interleave(5, 1)

    def compact(self, model: PreTrainedModel, inputs: Inputs, tokens: Tensor, keep: Tensor) -> Tensor:
        """Return logits [n, V] with dropped rows masked: an image's rows have no positions to number anew."""
        with self.masked(model, inputs, keep):
            return model(**self.grow(inputs, tokens[:, :-1]), use_cache=False).logits[0, -tokens.shape[1] :]

    def loop(self, model: PreTrainedModel, inputs: Inputs, tokens: Tensor, with_positions: bool) -> Iterator[Tensor]:
        cache, grown = None, inputs
        for step in range(tokens.shape[1]):
            text = {name: grown[name] for name in ("attention_mask", "cross_attention_mask")}
            given = {**inputs, **text} if step == 0 else {**text, "input_ids": tokens[:, step - 1 : step]}
            if with_positions:
                positions = self.positions(text["attention_mask"])["position_ids"]
                given["position_ids"] = positions[:, -given["input_ids"].shape[1] :]
            output = model(**given, past_key_values=cache, use_cache=True)
            cache, grown = output.past_key_values, self.grow(inputs, tokens[:, : step + 1])
            yield output.logits[:, -1]

    def compared(self, inputs: Inputs, keep: Tensor) -> Tensor:
        return inputs["attention_mask"].bool()

    def left_out(self, inputs: Inputs, labels: Tensor, keep: Tensor) -> Tensor:
        return torch.zeros_like(labels, dtype=torch.bool)  # no row of text leaves

    def grow(self, inputs: Inputs, tokens: Tensor) -> Inputs:
        sees = inputs["cross_attention_mask"]
        more = torch.cat([sees, sees[:, -1:].expand(-1, tokens.shape[1], -1, -1)], 1)
        return {**super().grow(inputs, tokens), "cross_attention_mask": more}
