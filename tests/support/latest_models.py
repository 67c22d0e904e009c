"""Small random models of the latest types, each laid out in its own way; and images for them."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.newer_models import EXPERTS, PLAIN, VISUAL, in_float64
from tests.support.oracles import END, IMAGE, START, Inputs
from tests.support.picture_models import LAYERS
from tests.support.samples import Image, Sample, each_sample, random_numbers
from tests.support.small_configs import GATED, TOWER

# --- Patches of all images in one list


def kimi() -> PreTrainedModel:
    text = {
        **GATED,
        **EXPERTS,
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    vision = {**PLAIN, "pos_emb_height": 8, "pos_emb_width": 8}
    config = hf.Kimi_K25Config(
        text_config=text,
        vision_config=vision,
        projection_hidden_size=32,
        vision_start_token_id=START,
        vision_end_token_id=END,
        **VISUAL,
    )
    return in_float64(hf.Kimi_K25ForConditionalGeneration(config))


def muse(kind: str, **text: Any) -> PreTrainedModel:
    """Return a model of `kind` MuseGlimmer or MuseSpark."""
    vision = {**PLAIN, "num_hidden_layers": 2, "pos_emb_height": 4, "pos_emb_width": 4, "max_position_embeddings": 16}
    plain = {"output_multiplier": 1.0, "final_logit_softcapping": 1e7}  # logits are those that the head gives
    own = {"audio_config": MUSE_AUDIO, "audio_token_id": 116} if kind == "MuseSpark" else {}
    config = getattr(hf, f"{kind}Config")(
        text_config={**GATED, **LAYERS, "head_dim": 8, **plain, **text},
        vision_config=vision,
        out_hidden_size=128,
        projector_hidden_size=32,
        **VISUAL,
        **own,
    )
    return in_float64(getattr(hf, f"{kind}ForConditionalGeneration")(config))


MUSE_AUDIO = {
    "patch_sizes": [4, 2],
    "hidden_sizes": [8, 8],
    "depths": [1, 1],
    "num_hidden_layers": 2,
    "out_hidden_size": 32,
}
MUSE_EXPERTS = {"moe_intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_hidden_size": 16}


# --- Molmo 2


def molmo2() -> PreTrainedModel:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    config = hf.Molmo2Config(
        text_config={**GATED, "head_dim": 8, "additional_vocab_size": 8},
        vision_config={**TOWER, **heads, "image_size": [24, 24]},
        adapter_config={
            **heads,
            "hidden_size": 32,
            "intermediate_size": 64,
            "text_hidden_size": 32,
            "vision_feature_layer": [-1, 0],
        },
        image_patch_id=IMAGE,
        image_start_token_id=START,
        image_end_token_id=END,
    )
    return hf.Molmo2ForConditionalGeneration(config)


def views(rows: int, columns: int, crops: int, seed: int) -> Image:
    """Return an image of Molmo 2: two by two tokens of the whole, and rows and columns of tokens of its crops."""
    tokens = 4 + rows * columns
    pooled = torch.randint(-1, 9 * crops, (tokens, 4), generator=torch.Generator().manual_seed(seed))
    pooled[:, 0] = torch.arange(tokens) % (9 * crops)  # each token is of one patch at least
    tensors = {
        "pixel_values": random_numbers(crops, 9, 192, seed=seed),
        "pooling": pooled,
        "image_grids": torch.tensor([2, 2, rows, columns]),
        "image_num_crops": torch.tensor(crops),
    }
    return Image(tokens, tensors)


def molmo2_inputs(samples: Sequence[Sample], text: Inputs) -> Inputs:
    """Return Molmo 2's tensors: patches are numbered through all images of a batch."""
    images = [image.tensors for sample in samples for image in sample.images]
    types = {"mm_token_type_ids": (text["input_ids"] == IMAGE).long()}
    if not images:
        return types
    before, pooled = 0, list[Tensor]()
    for image in images:
        pooled.append(torch.where(image["pooling"] >= 0, image["pooling"] + before, -1))
        before += 9 * len(image["pixel_values"])
    named = {name: torch.stack([image[name] for image in images]) for name in ("image_grids", "image_num_crops")}
    pixels = torch.cat([image["pixel_values"] for image in images])
    return {**types, **named, "pixel_values": pixels, "image_token_pooling": torch.cat(pooled)}


# --- Tiles


GRANITE = ("residual_multiplier", "embedding_multiplier", "logits_scaling")


def granite_docling() -> PreTrainedModel:
    vision = {**TOWER, "patch_size": 4, "out_hidden_size": 32, "scale_factor": 2, "deepstack_visual_indexes": [0, 1]}
    config = hf.GraniteDoclingConfig(
        text_config={**GATED, "attention_multiplier": 8**-0.5, **dict.fromkeys(GRANITE, 1.0)},
        vision_config=vision,
        image_token_id=IMAGE,
    )
    return hf.GraniteDoclingForConditionalGeneration(config)


def granite_inputs(samples: Sequence[Sample], text: Inputs) -> Inputs:
    inputs = each_sample(samples, text)
    return {**inputs, "pixel_attention_mask": inputs["pixel_values"].flatten(2).any(2)} if inputs else {}


def step3p7() -> PreTrainedModel:
    text = {**GATED, **LAYERS, "head_dim": 8, "mlp_layer_types": ["dense"] * LAYERS["num_hidden_layers"]}
    vision = {**TOWER, "image_size": 48, "patch_size": 4, "num_hidden_layers": 2, "mlp_ratio": 2.0}
    config = hf.Step3p7Config(text_config=text, vision_config=vision, image_token_id=IMAGE)
    return hf.Step3p7ForConditionalGeneration(config)


def step_images() -> list[list[Image]]:
    """Return images of Step 3.7: four tokens of each tile, nine of the whole."""
    number, images = 0, list[list[Image]]()
    for tiles in ((2,), (0, 1), (3,)):
        own = list[Image]()
        for count in tiles:
            number += 1
            small = random_numbers(count, 3, 24, 24, seed=number)
            own += [Image(4, {"small": tile}) for tile in small]
            own.append(Image(9, {"pixel_values": random_numbers(3, 48, 48, seed=40 + number)}))
        images.append(own)
    return [*images, []]


def step_inputs(samples: Sequence[Sample], text: Inputs) -> Inputs:
    images = [image.tensors for sample in samples for image in sample.images]
    if not images:
        return {}
    small, numbers = [image["small"] for image in images if "small" in image], list[int]()
    count = 0
    for image in images:
        count += "small" in image
        if "small" not in image:
            numbers.append(count)
            count = 0
    local = {"pixel_values_local": torch.stack(small), "num_local_patches": torch.tensor(numbers)} if small else {}
    return {"pixel_values": torch.stack([image["pixel_values"] for image in images if "small" not in image]), **local}
