"""Small random models whose decoder takes more than rows of embeddings: inputs of each layer, types, features."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

from tests.support.grid_models import PATCHES, QWEN, ROTARY, grid
from tests.support.newer_models import DEEPSTACK, in_float64
from tests.support.oracles import END, IMAGE, PAD, START, VIDEO, Inputs
from tests.support.projector_models import SLIDING
from tests.support.samples import Image, Sample, each_image, random_numbers
from tests.support.small_configs import GATED, TOWER

LAYERS: dict[str, Any] = {name: SLIDING[name] for name in ("sliding_window", "num_hidden_layers", "layer_types")}
VISUAL: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": VIDEO}


def gemma4(**text: Any) -> PreTrainedModel:
    """Return a Gemma 4; as published its last layers read keys and values of layers before them."""
    config = hf.Gemma4Config(
        text_config={**GEMMA4, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 120, **text},
        vision_config={
            **{name: TOWER[name] for name in TOWER if name != "image_size"},
            "num_key_value_heads": 4,
            "head_dim": 8,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
        },
        audio_config=None,
        audio_token_id=116,
        boi_token_id=START,
        eoi_token_id=END,
        **VISUAL,
    )
    return hf.Gemma4ForConditionalGeneration(config)


GEMMA4: dict[str, Any] = {
    **GATED,
    **LAYERS,
    "head_dim": 8,
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "final_logit_softcapping": None,
    "pad_token_id": PAD,
}


def gemma4_unified() -> PreTrainedModel:
    text = {name: GEMMA4[name] for name in GEMMA4 if name != "hidden_size_per_layer_input"}
    vision = {
        "patch_size": 2,
        "pooling_kernel_size": 2,
        "mm_embed_dim": 32,
        "mm_posemb_size": 8,
        "output_proj_dims": 32,
    }
    config = hf.Gemma4UnifiedConfig(
        text_config=text,
        vision_config=vision,
        audio_config=None,
        audio_token_id=116,
        boi_token_id=START,
        eoi_token_id=END,
        **VISUAL,
    )
    return hf.Gemma4UnifiedForConditionalGeneration(config)


def spots(height: int, width: int, seed: int, frames: int = 0, each: int = 4) -> Image:
    """Return an image of Gemma 4, of a height and width in patches, or so many frames of a video.

    So many patches as `each` says make a token; patches of zeros fill it up to 36.
    """
    places = torch.full((36, 2), -1)
    places[: height * width] = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(1)
    pixels = random_numbers(max(frames, 1), 36, 48, seed=seed).masked_fill((places == -1).all(1)[:, None], 0)
    if frames:
        tensors = {"pixel_values_videos": pixels, "video_position_ids": places.expand(frames, -1, -1)}
        return Image(frames * height * width // each, tensors, VIDEO)
    return Image(height * width // each, {"pixel_values": pixels[0], "image_position_ids": places})


def gemma4_inputs(samples: Sequence[Sample], text: Inputs) -> Inputs:
    """Return Gemma 4's tensors: frames of all videos lie one after the other, and types of tokens."""
    images = [image.tensors for sample in samples for image in sample.images]
    types = {"mm_token_type_ids": (text["input_ids"] == IMAGE).long() + 2 * (text["input_ids"] == VIDEO)}
    stills = [image for image in images if "pixel_values" in image]
    found = {name: torch.stack([image[name] for image in stills]) for name in (stills[0] if stills else ())}
    videos = [image for image in images if "pixel_values_videos" in image]
    for name in videos[0] if videos else ():
        found[name] = torch.cat([video[name] for video in videos])
    counts = torch.tensor([len(video["pixel_values_videos"]) for video in videos])
    return {**types, **found, **({"num_frames_per_video": counts} if videos else {})}


def ernie() -> PreTrainedModel:
    text = {
        **GATED,
        "moe_intermediate_size": [16, 16],
        "moe_k": 2,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
        "rope_parameters": {**ROTARY, "mrope_section": [1, 1, 2]},
    }
    config = hf.Ernie4_5_VLMoeConfig(
        text_config=text,
        vision_config={**PATCHES, "depth": 2},
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=START,
        video_end_token_id=END,
        **VISUAL,
    )
    return in_float64(hf.Ernie4_5_VLMoeForConditionalGeneration(config))


def joined_frames(seed: int) -> Image:
    """Return a video of four frames for ERNIE 4.5, which joins two and two."""
    video = grid(4, 4, 4, seed, (48,))
    return Image(video.tokens // 2, video.tensors, VIDEO)


def ernie_inputs(samples: Sequence[Sample], text: Inputs) -> Inputs:
    types = (text["input_ids"] == IMAGE).long() + 2 * (text["input_ids"] == VIDEO)
    return {**each_image(samples, text, torch.cat), "mm_token_type_ids": types, "moe_mm_token_type_ids": types}


def compass() -> PreTrainedModel:
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {**GATED, "layer_types": ["full_attention"] * 3, "rope_parameters": {"full_attention": rotary}}
    config = hf.CohereCompassConfig(text_config=text, vision_config=DEEPSTACK, **QWEN)
    return hf.CohereCompassForConditionalGeneration(config)
