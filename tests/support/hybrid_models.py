"""Small random models whose decoder has layers with a recurrent state; and images for them."""

from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

from tests.support.grid_models import PATCHES, QWEN, ROTARY
from tests.support.newer_models import EXPERTS, in_float64
from tests.support.oracles import IMAGE
from tests.support.samples import Image, random_numbers
from tests.support.small_configs import GATED, TOWER

TURNS = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
DELTA: dict[str, Any] = {
    **GATED,
    **TURNS,
    "head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {**ROTARY, "mrope_interleaved": True, "partial_rotary_factor": 1.0},
}
VISION = {**PATCHES, "depth": 2, "out_hidden_size": 32, "num_position_embeddings": 64}


def qwen3_5() -> PreTrainedModel:
    return hf.Qwen3_5ForConditionalGeneration(hf.Qwen3_5Config(text_config=DELTA, vision_config=VISION, **QWEN))


def qwen3_5_moe() -> PreTrainedModel:
    text = {**DELTA, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16}
    config = hf.Qwen3_5MoeConfig(text_config=text, vision_config=VISION, **QWEN)
    return in_float64(hf.Qwen3_5MoeForConditionalGeneration(config))


def lfm2_vl(*layers: str) -> PreTrainedModel:
    text = hf.Lfm2Config(**{**GATED, "num_hidden_layers": len(layers)}, layer_types=list(layers))
    vision = {**{name: TOWER[name] for name in TOWER if name != "image_size"}, "patch_size": 4, "num_patches": 36}
    config = hf.Lfm2VlConfig(
        vision_config={**vision, "vision_use_head": False},
        text_config=text,
        image_token_id=IMAGE,
        projector_hidden_size=32,
    )
    return hf.Lfm2VlForConditionalGeneration(config)


def spread(height: int, width: int, seed: int) -> Image:
    """Return an image of LFM2-VL, of a height and width in patches; four of them make a token."""
    pixels = random_numbers(height * width, 48, seed=seed)
    tensors = {
        "pixel_values": pixels,
        "spatial_shapes": torch.tensor([height, width]),
        "pixel_attention_mask": torch.ones(height * width).long(),
    }
    return Image(height * width // 4, tensors)


def spreads() -> list[list[Image]]:
    return [[spread(4, 6, 0)], [spread(4, 4, 1), spread(6, 4, 2)], [spread(6, 6, 3)], []]
