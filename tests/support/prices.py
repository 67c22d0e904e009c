"""What a prompt really costs a model: FLOPs of its layers by torch's counter, and bytes of the cache that it fills."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from catp_lightning.pricing import Prices, Prompts
from tests.support.encoder_oracles import CrossAttention, EncoderDecoder
from tests.support.oracles import PAD, Inputs, cache_of, visual_columns
from tests.support.rows import Row


def read_by(row: Row, model: PreTrainedModel) -> list[nn.Module]:
    """The modules whose products are counted: layers of the decoder, or of the encoder and what attends to it."""
    if isinstance(row.oracle, EncoderDecoder):
        text: Any = model.language_model
        return [*text.encoder.block, *(block.layer[1].EncDecAttention for block in text.decoder.block)]
    path = getattr(row.oracle, "path", "model.language_model")
    return list(model.get_submodule(path).layers)


def paid(row: Row, model: PreTrainedModel, inputs: Inputs) -> dict[str, int]:
    """FLOPs and cached bytes of one prefill, as torch counts them."""
    start = {"decoder_input_ids": torch.tensor([[PAD]])} if isinstance(row.oracle, EncoderDecoder) else {}
    counter = FlopCounterMode(display=False)
    # Torch does not count its own attention kernel for CPUs; without gradients it fails on parameters as inputs.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        output = model(**inputs, **start, use_cache=True)
    counts, names = counter.get_flop_counts(), {module: name for name, module in model.named_modules()}
    cache = cache_of(output)
    parts = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    layers = [layer for part in (parts if parts[0] is not None else [cache]) for layer in part.layers]
    held = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return {
        "prefill_flops": sum(
            sum(counts[f"{type(model).__name__}.{names[module]}"].values()) for module in read_by(row, model)
        ),
        "cache_bytes": sum(tensor.nbytes for tensor in held if tensor is not None),
    }


def prompts_of(row: Row, inputs: Inputs) -> Prompts:
    rows, tokens = inputs["attention_mask"].sum(1), row.oracle.tokens(inputs)
    if not isinstance(row.oracle, CrossAttention):
        return Prompts.of(rows - visual_columns(inputs).sum(1), tokens.sum(1))
    sees = inputs["cross_attention_mask"].flatten(2).any(2) & inputs["attention_mask"].bool()
    images = torch.full_like(rows, tokens.shape[1])
    return Prompts.of(rows, tokens.sum(1), images, rows - sees.sum(1))


def known(prices: Prices, prompts: Prompts, visual: Tensor | None = None) -> dict[str, int]:
    """What `paid` finds, by arithmetic."""
    return {unit: int(prices.price(unit, prompts, visual).sum()) for unit in ("prefill_flops", "cache_bytes")}
