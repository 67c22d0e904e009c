"""A small Llama-3.2-Vision, prompts with images in every place, and the masked run."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from catp_lightning.methods.observation import Signal
from catp_lightning.methods.selection import Selection
from catp_lightning.models.mllama import Mllama
from catp_lightning.prompt.prompt import CrossAttended
from catp_lightning.pruning.sites import SiteSettings
from catp_lightning.pruning.sites.cross_attention import PruneCrossAttention
from tests.support.oracles import cache_of
from tests.support.steps import stepwise

IMAGE, PAD, LENGTH, TILES, ROWS = 99, 0, 14, 4, 17  # 16 patches and [CLS] in a tile
NEW = 4  # tokens of an answer
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
CROSS = [1, 3]
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "suppress_tokens": [IMAGE]}
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Where each sample has its images: (column, tiles used) each; and how many columns at its left are padding.

    `cached` is how many rows the cache holds: those that the last text row of any sample sees.
    """

    samples: list[list[tuple[int, int]]]
    cached: int
    pads: int = 0
    blind_end: int = 0  # the last columns of the last sample see nothing


CASES = {
    "image first": Case([[(0, 1)]] * 3, ROWS),
    "image in the middle": Case([[(6, 1)]] * 3, ROWS),
    "other tiles in every sample": Case([[(6, 1)], [(4, 2)], [(5, 2)]], 2 * ROWS),
    "two images side by side": Case([[(3, 1), (4, 1)]] * 2, 2 * ROWS),
    "two images apart": Case([[(3, 1), (9, 1)]] * 2, ROWS),
    "one or two images, padded": Case([[(5, 1), (9, 2)], [(6, 3)], [(3, 2), (4, 1)]], 3 * ROWS, pads=2),
    "every tile used": Case([[(2, 4)], [(6, 4)]], 4 * ROWS),
    "a sample without an image": Case([[(5, 1)], [], [(3, 2)]], 4 * ROWS),
    "an image that the end does not see": Case([[(5, 1)], [(2, 2)]], 4 * ROWS, blind_end=4),
}


@cache
def model_of(dtype: torch.dtype, attention: str = "sdpa") -> MllamaForConditionalGeneration:
    """Open gates and sharp attention: a row more or less must move the logits, or a test proves nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision = MllamaVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_global_layers=1,
            attention_heads=4,
            image_size=32,
            patch_size=8,
            max_num_tiles=TILES,
            vision_output_dim=64,
            intermediate_layers_indices=[0],
            supported_aspect_ratios=[[1, 1], [1, 2], [1, 3], [2, 2]],
        )
        text = MllamaTextConfig(
            vocab_size=100,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            cross_attention_layers=CROSS,
            pad_token_id=PAD,
            bos_token_id=1,
            eos_token_id=None,
            initializer_range=0.15,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
        model = MllamaForConditionalGeneration(
            MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
        ).eval()
        for layer in (model.model.language_model.layers[n] for n in CROSS):
            layer.cross_attn_attn_gate.data.fill_(1.0), layer.cross_attn_mlp_gate.data.fill_(1.0)
            layer.cross_attn.q_norm.weight.data.fill_(1.5), layer.cross_attn.k_norm.weight.data.fill_(1.5)
        model.model.multi_modal_projector.weight.data.normal_(0, 0.3)
        model.to(dtype).set_attn_implementation(attention)
        model.generation_config.pad_token_id = PAD
    return model


def inputs_of(case: Case, dtype: torch.dtype = torch.float64, length: int = LENGTH) -> Inputs:
    """As the processor makes them: text sees an image up to the next one, neighbours together to the end."""
    batch, images = len(case.samples), max(1, *map(len, case.samples))
    ids = torch.randint(3, IMAGE - 1, (batch, length))
    mask, sees = torch.ones_like(ids), torch.zeros(batch, length, images, TILES, dtype=torch.long)
    ratio, present = torch.zeros(batch, images, dtype=torch.long), torch.zeros(batch, images, TILES, dtype=torch.long)
    present[:, :, 0] = 1  # as the processor marks a missing image
    for row, own in enumerate(case.samples):
        for index, (column, used) in enumerate(own):
            after = own[index + 1][0] if index + 1 < len(own) else length
            ids[row, column] = IMAGE
            sees[row, column : length if after == column + 1 else after, index, :used] = 1
            ratio[row, index], present[row, index] = used, (torch.arange(TILES) < used).long()
    ids[0, : case.pads], mask[0, : case.pads] = PAD, 0
    if case.blind_end:
        sees[-1, -case.blind_end :] = 0
    pixels = torch.randn(batch, images, TILES, 3, 32, 32) * present[..., None, None, None]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "cross_attention_mask": sees,
        "pixel_values": pixels.to(dtype),
        "aspect_ratio_ids": ratio,
        "aspect_ratio_mask": present,
    }


def seen(inputs: Inputs) -> Tensor:
    """Rows that some text sees: bool [B, T]."""
    sees = inputs["cross_attention_mask"].bool() & inputs["attention_mask"].bool()[:, :, None, None]
    return sees.any(1).flatten(1).repeat_interleave(ROWS, 1)


def everything(prompt: CrossAttended) -> Tensor:
    return prompt.tokens


def uneven(prompt: CrossAttended) -> Tensor:
    """Each sample keeps another share of each of its images, scattered."""
    generator = torch.Generator().manual_seed(4)
    scores = torch.rand(prompt.tokens.shape, generator=generator)
    shares = torch.tensor([0.2, 0.7, 0.4])[: len(scores), None]
    return (scores < shares) & prompt.tokens


@contextmanager
def dropping(
    model: nn.Module, choose: Callable[[CrossAttended], Tensor], observe: bool = False, **more: Any
) -> Iterator[PruneCrossAttention]:
    settings = SiteSettings(needs={Signal.CROSS_ATTENTION_TO_IMAGE: None} if observe else {})
    rows = PruneCrossAttention(Mllama(model), lambda prompt: Selection(choose(prompt)), settings, **more)
    with rows.installed():
        yield rows


@contextmanager
def masking(model: nn.Module, keep: Tensor, prompt: int = LENGTH) -> Iterator[None]:
    """The oracle: the dropped rows are masked for text that sees an image; the prompt sees them in the first layer."""

    def hide(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask, sees = kwargs["cross_attention_mask"], kwargs["full_text_row_masked_out_mask"].bool()
        gone = ~keep.repeat_interleave(len(mask) // len(keep), 0)[:, None, None] & sees
        if layer.layer_idx == CROSS[0]:
            length = mask.shape[2]  # shorter than the prompt: a decoding step
            gone = gone & ((torch.arange(length) >= prompt) | (length < prompt))[:, None]
        return args, {**kwargs, "cross_attention_mask": mask.masked_fill(gone, torch.finfo(mask.dtype).min)}

    layers = [model.model.language_model.layers[n] for n in CROSS]
    hooks = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def generate(model: nn.Module, inputs: Mapping[str, Any], **settings: Any) -> Any:
    """Sequences with their cache, and the logits of every step."""
    return stepwise(model, inputs, **{**GREEDY, **settings}, return_dict_in_generate=True)


def cross_cache(output: Any) -> list[tuple[int, int]]:
    """Rows and bytes that each cross-attention layer has cached."""
    layers = [cache_of(output).layers[n] for n in CROSS]
    return [(layer.keys.shape[2], layer.keys.nbytes + layer.values.nbytes) for layer in layers]


def top_attended(prompt: CrossAttended) -> Tensor:
    """A choice by the text's attention: the same with and without a cache only if it is the prompt's alone."""
    paid = prompt.attention.sum(1).masked_fill(~prompt.tokens, -1)
    counts = (prompt.tokens.sum(1, keepdim=True) * 0.3).ceil()
    image = torch.arange(paid.shape[1]).div(TILES * ROWS, rounding_mode="floor")
    best = torch.stack([paid.masked_fill(image != i, -1).amax(1) for i in range(int(image.max()) + 1)], 1)
    top = paid.argsort(1, descending=True).argsort(1) < counts
    return (top | (paid == best[:, image])) & prompt.tokens


def padded(inputs: Inputs, left: int, right: int, sees: int) -> Inputs:
    """The same samples with more padding, which sees every tile or none."""
    text = {"input_ids": PAD, "attention_mask": 0, "cross_attention_mask": sees}
    pads = {name: [0, 0] * (inputs[name].dim() - 2) + [left, right] for name in text}
    return {**inputs, **{name: nn.functional.pad(inputs[name], pads[name], value=text[name]) for name in text}}
