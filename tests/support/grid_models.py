"""Small random models whose images have sizes of their own, laid out as Qwen-VL's or Mistral's; and images for them."""

from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

from tests.support.oracles import END, IMAGE, START, VIDEO
from tests.support.samples import Image, random_numbers
from tests.support.small_configs import GATED, TOKENS, TOWER

# --- Qwen-VL

QWEN: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
PATCHES = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 4}


def qwen2_vl() -> PreTrainedModel:
    vision = {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
    config = hf.Qwen2VLConfig(text_config={**GATED, "rope_parameters": ROTARY}, vision_config=vision, **QWEN)
    return hf.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl() -> PreTrainedModel:
    vision = {**PATCHES, "depth": 4, "window_size": 16, "fullatt_block_indexes": [1, 3], "out_hidden_size": 32}
    config = hf.Qwen2_5_VLConfig(text_config={**GATED, "rope_parameters": ROTARY}, vision_config=vision, **QWEN)
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> PreTrainedModel:
    deep = {"depth": 4, "out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]}
    text = {**GATED, "head_dim": 8, "rope_parameters": {**ROTARY, "mrope_interleaved": True}}
    config = hf.Qwen3VLConfig(text_config=text, vision_config={**PATCHES, **deep}, **QWEN)
    return hf.Qwen3VLForConditionalGeneration(config)


def grid(time: int, height: int, width: int, seed: int, patch: tuple[int, ...] = (96,), side: int = 2) -> Image:
    """Return an image, or if `time` is above 1 a video, as rows of patches; `side` squared of them make a token."""
    kind = ("pixel_values_videos", "video_grid_thw") if time > 1 else ("pixel_values", "image_grid_thw")
    patches = random_numbers(time * height * width, *patch, seed=seed)
    tensors = dict(zip(kind, (patches, torch.tensor([time, height, width])), strict=True))
    return Image(time * height * width // side**2, tensors, VIDEO if time > 1 else IMAGE)


def apart(video: Image) -> list[Image]:
    """Return the frames of a video as images, with text between them; the first one has all tensors."""
    frames = int(video.tensors["video_grid_thw"][0])
    own = [video.tensors, *({} for _ in range(frames - 1))]
    return [Image(video.tokens // frames, tensors, video.placeholder) for tensors in own]


def grids(*last: Image, patch: tuple[int, ...] = (96,)) -> list[list[Image]]:
    return [[grid(1, 4, 6, 0, patch)], [grid(1, 4, 4, 1, patch), grid(1, 6, 4, 2, patch)], list(last), []]


def mistral3(window: int | None = None) -> PreTrainedModel:
    config = hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**{**TOWER, "image_size": 64, "patch_size": 4}),
        text_config=hf.MistralConfig(**GATED, head_dim=8, sliding_window=window),
        spatial_merge_size=2,
        **TOKENS,
    )
    return hf.Mistral3ForConditionalGeneration(config)


def pixtral() -> PreTrainedModel:
    config = hf.LlavaConfig(
        vision_config=hf.PixtralVisionConfig(**{**TOWER, "image_size": 64, "patch_size": 4}),
        text_config=hf.MistralConfig(**GATED, head_dim=8, sliding_window=None),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        **TOKENS,
    )
    return hf.LlavaForConditionalGeneration(config)


def sized(pixels_of_token: int) -> list[list[Image]]:
    """Return images of different sizes, with a token for each square of so many pixels a side."""

    def image(rows: int, columns: int, seed: int) -> Image:
        size = rows * pixels_of_token, columns * pixels_of_token
        tensors = {"pixel_values": random_numbers(3, *size, seed=seed), "image_sizes": torch.tensor(size)}
        return Image(rows * columns, tensors)

    return [[image(3, 4, 0)], [image(2, 2, 1), image(2, 3, 2)], [image(4, 3, 3)], []]
