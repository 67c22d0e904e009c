"""Models of other families at the shapes of released ones, of random weights, with prompts for them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from benchmarks.bench.shapes import of_random_weights

TEXT, VOCABULARY = 40, 2000
IMAGE, VIDEO, START, END = 1999, 1998, 1997, 1996
"""A vocabulary of 2,000 instead of 50 to 152 thousand: the head reads one row of a prompt."""


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder: width, layers, heads, heads of keys and values, inner width."""

    width: int
    layers: int
    heads: int
    keys: int
    inner: int

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of a configuration."""
        return {
            "vocab_size": VOCABULARY,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.keys,
            "intermediate_size": self.inner,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }


def qwen(tiny: bool) -> Qwen2_5_VLConfig:
    """Return the configuration of a Qwen2.5-VL-7B, or one laid out as it that is small."""
    sizes = Decoder(64, 4, 4, 2, 128) if tiny else Decoder(3584, 28, 28, 4, 18944)
    vision = {"depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "fullatt_block_indexes": [1, 3]}
    full = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    rotary = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3] if tiny else [16, 24, 24]}
    return Qwen2_5_VLConfig(
        text_config={**sizes.settings, "rope_parameters": rotary, "rope_scaling": rotary},
        vision_config={**(vision if tiny else full), "out_hidden_size": sizes.width},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def blip2(tiny: bool) -> Blip2Config:
    """Return the configuration of a BLIP-2 OPT-2.7B, or one laid out as it that is small."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes = Decoder(64, 4, 4, 4, 128) if tiny else Decoder(2560, 32, 32, 32, 10240)
    text = {**sizes.settings, "model_type": "opt", "word_embed_proj_dim": sizes.width, "ffn_dim": sizes.inner}
    return Blip2Config(
        vision_config={**small, "image_size": 64, "patch_size": 8} if tiny else {"initializer_range": 0.02},
        qformer_config={**small, "encoder_hidden_size": 32} if tiny else {},
        text_config=text,
        image_token_index=IMAGE,
    )


def mllama(tiny: bool) -> MllamaConfig:
    """Return the configuration of a Llama-3.2-11B-Vision, or one laid out as it that is small."""
    sizes = Decoder(64, 6, 4, 2, 128) if tiny else Decoder(4096, 40, 32, 8, 14336)
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_global_layers": 1, "attention_heads": 4}
    small |= {"intermediate_size": 64, "vision_output_dim": 64, "intermediate_layers_indices": [0]}
    rotary = {"rope_type": "default", "rope_theta": 5e5}
    return MllamaConfig(
        vision_config={**small, "image_size": 56} if tiny else {"image_size": 560},
        text_config={
            **sizes.settings,
            "rope_parameters": rotary,
            "cross_attention_layers": [1, 4] if tiny else [3, 8, 13, 18, 23, 28, 33, 38],
        },
        image_token_index=IMAGE,
    )


def prompt(model: PreTrainedModel, batch: int, side: int) -> dict[str, Tensor]:
    """Return arguments of a model's call: `batch` samples of one image, and `TEXT` rows of text.

    Args:
        side: patches along a side of Qwen's images, a multiple of 4; other models have one size.
    """
    device, dtype = model.device, model.dtype
    generator = torch.Generator(device="cpu").manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(device, dtype)

    def given(tokens: int, *before: int) -> dict[str, Tensor]:
        ids = torch.randint(3, 1900, (batch, tokens + TEXT), generator=generator, device="cpu", dtype=torch.int64)
        ids[:, 4 - len(before) : 4 + tokens] = torch.tensor(
            [*before, *[IMAGE] * tokens], device="cpu", dtype=torch.int64
        )
        return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}

    config: Any = model.config
    if isinstance(model, Qwen2_5_VLForConditionalGeneration):
        grid = torch.tensor([[1, side, side]] * batch, device=device, dtype=torch.int64)
        ids = given(side**2 // 4, START)
        kinds = (ids["input_ids"] == IMAGE).long()
        return {
            **ids,
            "mm_token_type_ids": kinds,
            "image_grid_thw": grid,
            "pixel_values": normal(batch * side**2, 1176),
        }
    pixels = config.vision_config.image_size
    if isinstance(model, Blip2ForConditionalGeneration):
        return {**given(config.num_query_tokens), "pixel_values": normal(batch, 3, pixels, pixels)}
    ids = given(1)
    seen = (torch.arange(ids["input_ids"].shape[1], device=device, dtype=torch.int64) >= 4).long()
    ratio = config.vision_config.supported_aspect_ratios.index([2, 2]) + 1
    return {
        **ids,
        "pixel_values": normal(batch, 1, 4, 3, pixels, pixels),
        "aspect_ratio_ids": torch.full((batch, 1), ratio, device=device, dtype=torch.int64),
        "aspect_ratio_mask": torch.ones(batch, 1, 4, device=device, dtype=torch.int64),
        "cross_attention_mask": seen[None, :, None, None].repeat(batch, 1, 1, 4),
    }


MODELS: dict[str, tuple[type[PreTrainedModel], Callable[[bool], PreTrainedConfig], tuple[str, ...]]] = {
    "Qwen2.5-VL-7B": (Qwen2_5_VLForConditionalGeneration, qwen, ("l2-norm", "divprune", "fastv")),
    "BLIP-2 OPT-2.7B": (Blip2ForConditionalGeneration, blip2, ("l2-norm", "divprune", "catp")),
    "Llama-3.2-11B-Vision": (MllamaForConditionalGeneration, mllama, ("l2-norm", "divprune", "trimmed-llama")),
}
"""Class and configuration of a model, and the methods that are measured on it."""


def build(name: str, tiny: bool, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model of `MODELS`, made on a device in `dtype`."""
    kind, config, _ = MODELS[name]
    return of_random_weights(kind, config(tiny), device, dtype)
