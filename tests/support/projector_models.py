"""Small random models that project the patches of a tower, whole images or crops; and images for them."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

from tests.support.oracles import END, IMAGE, PAD, START, VIDEO, Inputs
from tests.support.samples import Image, Sample, each_image, random_numbers
from tests.support.small_configs import GATED, TOKENS, TOWER, clip, siglip


def llava() -> PreTrainedModel:
    config = hf.LlavaConfig(vision_config=clip(), text_config=hf.LlamaConfig(**GATED), **TOKENS)
    return hf.LlavaForConditionalGeneration(config)


def vip_llava() -> PreTrainedModel:
    config = hf.VipLlavaConfig(
        vision_config=clip(), text_config=hf.LlamaConfig(**GATED), vision_feature_layers=[-1, -2, 1], **TOKENS
    )
    return hf.VipLlavaForConditionalGeneration(config)


SMALL = {"image_size": 16, "patch_size": 8}  # 4 patches a crop
PINPOINTS = [[16, 32], [32, 32]]


def llava_next() -> PreTrainedModel:
    config = hf.LlavaNextConfig(
        vision_config=clip(**SMALL), text_config=hf.LlamaConfig(**GATED), image_grid_pinpoints=PINPOINTS, **TOKENS
    )
    return hf.LlavaNextForConditionalGeneration(config)


def crops(tokens: int, size: tuple[int, int], count: int, seed: int, side: int = 16) -> Image:
    """Return an image of a height and width as `count` crops, the first of them a small picture of the whole."""
    pixels = random_numbers(count, 3, side, side, seed=seed)
    return Image(tokens, {"pixel_values": pixels, "image_sizes": torch.tensor(size)})


def several_crops() -> list[list[Image]]:
    """Return LLaVA-NeXT's images: tokens are patches of the whole, those of crops without padding, a newline a row."""
    wide, tall, large = crops(14, (15, 32), 3, 0), crops(16, (32, 12), 5, 1), crops(24, (30, 30), 5, 2)
    return [[wide], [tall, crops(14, (16, 32), 3, 3)], [large], []]


def video(tokens: int, frames: int, side: int, seed: int) -> Image:
    pixels = random_numbers(frames, 3, side, side, seed=seed)
    return Image(tokens, {"pixel_values_videos": pixels}, VIDEO)


def llava_next_video() -> PreTrainedModel:
    config = hf.LlavaNextVideoConfig(
        vision_config=clip(**SMALL),
        text_config=hf.LlamaConfig(**GATED),
        image_grid_pinpoints=PINPOINTS,
        video_token_index=VIDEO,
        **TOKENS,
    )
    return hf.LlavaNextVideoForConditionalGeneration(config)


def llava_onevision() -> PreTrainedModel:
    config = hf.LlavaOnevisionConfig(
        vision_config=siglip(),
        text_config=hf.Qwen2Config(**GATED),
        image_grid_pinpoints=[[24, 48], [48, 24]],
        vision_aspect_ratio="anyres_max_2",
        video_token_index=VIDEO,
        **TOKENS,
    )
    return hf.LlavaOnevisionForConditionalGeneration(config)


def onevision_images() -> list[list[Image]]:
    """Return LLaVA-OneVision's images: one of a sample is cut into crops; several are not, and have a newline each."""
    pair = [crops(10, (24, 24), 3, 1, 24), crops(10, (20, 24), 3, 2, 24)]
    return [[crops(30, (24, 48), 3, 0, 24)], pair, [crops(21, (48, 15), 3, 3, 24)], []]


def video_llava() -> PreTrainedModel:
    config = hf.VideoLlavaConfig(
        vision_config=clip(), text_config=hf.LlamaConfig(**GATED), video_token_index=VIDEO, **TOKENS
    )
    return hf.VideoLlavaForConditionalGeneration(config)


def video_llava_inputs(samples: Sequence[Sample], text: Inputs) -> Inputs:
    """Return Video-LLaVA's tensors; images were the argument pixel_values_images before transformers 5.2x."""
    inputs = each_image(samples, text)
    if "pixel_values" not in inspect.signature(hf.VideoLlavaForConditionalGeneration.forward).parameters:
        inputs = {name + "_images" * (name == "pixel_values"): tensor for name, tensor in inputs.items()}
    return inputs


# --- Other models with placeholders


def internvl() -> PreTrainedModel:
    vision = {**TOWER, "image_size": [24, 24], "patch_size": [4, 4]}
    config = hf.InternVLConfig(
        vision_config=vision, text_config=hf.Qwen2Config(**GATED), image_token_id=IMAGE, image_seq_length=9
    )
    return hf.InternVLForConditionalGeneration(config)


SLIDING = {
    "head_dim": 8,
    "sliding_window": 12,
    "query_pre_attn_scalar": 8,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


def gemma3(vocabulary: int = 120) -> PreTrainedModel:
    text = hf.Gemma3TextConfig(**{**GATED, **SLIDING, "vocab_size": vocabulary})
    config = hf.Gemma3Config(
        text_config=text,
        vision_config=siglip(image_size=24, patch_size=4),
        mm_tokens_per_image=9,
        boi_token_index=START if vocabulary > START else 90,
        eoi_token_index=END if vocabulary > END else 91,
        **TOKENS,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def paligemma(text: Any) -> PreTrainedModel:
    config = hf.PaliGemmaConfig(
        vision_config=siglip(projection_dim=32), text_config=text, projection_dim=32, hidden_size=32, **TOKENS
    )
    return hf.PaliGemmaForConditionalGeneration(config)


def idefics(kind: str) -> PreTrainedModel:
    """Return a model of `kind` Idefics3 or SmolVLM."""
    config = getattr(hf, f"{kind}Config")(
        vision_config={**TOWER, "patch_size": 4},
        text_config=hf.LlamaConfig(**GATED),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


def gemma2() -> Any:
    """Return a configuration of Gemma 2 without its cap on logits, which does not matter for dropping.

    Older transformers forget the cap in PaliGemma.
    """
    return hf.Gemma2Config(**{**GATED, **SLIDING, "final_logit_softcapping": None})
