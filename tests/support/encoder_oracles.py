"""Oracles for models whose visual tokens are read from beside the text: by an encoder, or by cross-attention."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from tests.support.oracles import CACHE, PAD, Inputs, Oracle, cache_of, columns_kept, hidden_in, hooked, of_rows


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
                **{CACHE: cache_of(first)},
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
            past = kwargs[CACHE].get_seq_length() if kwargs.get(CACHE) is not None else 0
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
            output = model(**given, **{CACHE: cache}, use_cache=True)
            cache, grown = cache_of(output), self.grow(inputs, tokens[:, : step + 1])
            yield output.logits[:, -1]

    def compared(self, inputs: Inputs, keep: Tensor) -> Tensor:
        return inputs["attention_mask"].bool()

    def left_out(self, inputs: Inputs, labels: Tensor, keep: Tensor) -> Tensor:
        return torch.zeros_like(labels, dtype=torch.bool)  # no row of text leaves

    def grow(self, inputs: Inputs, tokens: Tensor) -> Inputs:
        sees = inputs["cross_attention_mask"]
        more = torch.cat([sees, sees[:, -1:].expand(-1, tokens.shape[1], -1, -1)], 1)
        return {**super().grow(inputs, tokens), "cross_attention_mask": more}
