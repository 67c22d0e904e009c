"""What observing a vision tower takes: [CLS] rows of a CLIP, attention received of all heads of a SigLIP."""

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    SiglipVisionConfig,
)

from benchmarks.bench.floor import Runs
from benchmarks.bench.shapes import IMAGE, of_random_weights, prompt
from benchmarks.bench.stages import stages
from catp_lightning import PruningPolicy

SIDE, PATCH = 24, 14


def observing(quick: bool, rounds: int, device: torch.device, dtype: torch.dtype) -> dict[str, list[dict[str, Any]]]:
    """Return rows of `stages` for each tower, 12 layers 512 wide before a decoder of one layer; `quick`: 2, 32 wide."""
    width, depth, heads = (32, 2, 4) if quick else (512, 12, 8)
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "image_size": SIDE * PATCH,
        "patch_size": PATCH,
    }
    towers = {
        "[CLS] row (CLIP)": (CLIPVisionConfig(**sizes), "default"),
        "received, all heads (SigLIP)": (SiglipVisionConfig(**sizes, vision_use_head=False), "full"),
    }
    found = {}
    for name, (vision, strategy) in towers.items():
        runs = Runs(model := _llava(vision, strategy, device, dtype), prompt(model, SIDE**2, 1))
        found[name] = stages(runs, {"fastervlm": PruningPolicy("fastervlm", keep=0.25)}, rounds)
    return found


def _llava(
    vision: PreTrainedConfig, strategy: str, device: torch.device, dtype: torch.dtype
) -> LlavaForConditionalGeneration:
    text = LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-2,
    )
    return of_random_weights(LlavaForConditionalGeneration, config, device, dtype)
