"""Small random models of newer types, laid out as Qwen-VL's or Mistral's; and images for them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

from tests.support.grid_models import PATCHES, QWEN, ROTARY, apart, grid
from tests.support.oracles import END, IMAGE, START, VIDEO, Inputs
from tests.support.projector_models import SLIDING
from tests.support.samples import Image, Sample, each_image, random_numbers
from tests.support.small_configs import GATED, TOWER

AUDIO, AUDIO_START, AUDIO_END = 116, 114, 115
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
DEEPSTACK = {
    **PATCHES,
    "depth": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1, 2],
}
INTERLEAVED = {**GATED, "head_dim": 8, "rope_parameters": {**ROTARY, "mrope_interleaved": True}}
WINDOWS = {**PATCHES, "depth": 4, "window_size": 16, "fullatt_block_indexes": [1, 3], "out_hidden_size": 32}
PLAIN = {**{name: TOWER[name] for name in TOWER if name != "image_size"}, "num_hidden_layers": 2, "patch_size": 4}
VISUAL: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": VIDEO}


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with eager experts: their fused products do not support float64."""
    model.set_experts_implementation("eager")
    return model


# --- GLM


def glm(kind: str, **text: Any) -> PreTrainedModel:
    """Return a model of `kind` Glm4v, Glm4vMoe, Glm46V, Glmga or GlmOcr."""
    of_4v = kind in ("Glm46V", "Glmga")
    config = getattr(hf, f"{kind}Config")(
        text_config={
            **({"model_type": "glm4v_text"} if of_4v else {}),
            **GATED,
            "rope_parameters": {**ROTARY, "partial_rotary_factor": 1.0},
            **text,
        },
        vision_config={
            **({"model_type": "glm4v_vision"} if of_4v else {}),
            **PATCHES,
            "depth": 2,
            "image_size": 16,
            "out_hidden_size": 32,
        },
        image_start_token_id=START,
        image_end_token_id=END,
        **VISUAL,
    )
    return getattr(hf, f"{'Glm46V' if of_4v else kind}ForConditionalGeneration")(config)


def glm_moe() -> PreTrainedModel:
    return in_float64(glm("Glm4vMoe", **EXPERTS, n_routed_experts=4))


def glm_video(seed: int) -> list[Image]:
    """Return a video of two frames, each in a run of image tokens of its own."""
    return [replace(frame, placeholder=IMAGE) for frame in apart(grid(2, 4, 4, seed))]


def glm_videos(samples: Sequence[Sample], text: Inputs) -> Inputs:
    return {**each_image(samples, text, torch.cat), "mm_token_type_ids": 2 * (text["input_ids"] == IMAGE)}


# --- Qwen and those that share its parts


def qwen3_vl_moe() -> PreTrainedModel:
    text = {**INTERLEAVED, **EXPERTS, "num_experts": 4}
    config = hf.Qwen3VLMoeConfig(text_config=text, vision_config=DEEPSTACK, **QWEN)
    return in_float64(hf.Qwen3VLMoeForConditionalGeneration(config))


HEARING = {
    "num_mel_bins": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "d_model": 32,
    "output_dim": 32,
    "max_source_positions": 100,
}
MARKS = {"audio_start_token_id": AUDIO_START, "vision_start_token_id": START, "vision_end_token_id": END}


def qwen2_5_omni() -> PreTrainedModel:
    config = hf.Qwen2_5OmniThinkerConfig(
        text_config={**GATED, "rope_parameters": ROTARY},
        vision_config=WINDOWS,
        audio_config=HEARING,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=AUDIO,
        audio_end_token_id=AUDIO_END,
        **MARKS,
    )
    return hf.Qwen2_5OmniThinkerForConditionalGeneration(config)


def qwen3_omni() -> PreTrainedModel:
    config = hf.Qwen3OmniMoeThinkerConfig(
        text_config={**INTERLEAVED, **EXPERTS, "num_experts": 4},
        vision_config=DEEPSTACK,
        audio_config={**HEARING, "downsample_hidden_size": 16},
        audio_token_id=AUDIO,
        **VISUAL,
        **MARKS,
    )
    return in_float64(hf.Qwen3OmniMoeThinkerForConditionalGeneration(config))


def omni_inputs(samples: Sequence[Sample], text: Inputs) -> Inputs:
    """Return the tensors of images, videos and sounds, and the seconds between two frames of each video."""
    inputs = each_image(samples, text, torch.cat)
    videos = len(inputs.get("video_grid_thw", ()))
    return {**inputs, "video_second_per_grid": torch.ones(videos)} if videos else inputs


def heard(samples: list[Sample], tokens: int) -> list[Sample]:
    """Put a sound, whose tokens are not visual ones, at the beginning of the first and the third sample."""
    for row in (0, 2):
        sound = {"input_features": random_numbers(16, 20, seed=row), "feature_attention_mask": torch.ones(20).long()}
        ids = [7, AUDIO_START, *[AUDIO] * tokens, AUDIO_END, *samples[row].ids]
        samples[row] = replace(samples[row], ids=ids, images=[*samples[row].images, Image(0, sound, AUDIO)])
    return samples


def cosmos_omni() -> PreTrainedModel:
    config = hf.Cosmos3OmniConfig(
        text_config={"model_type": "qwen3_vl_text", **INTERLEAVED},
        vision_config={"model_type": "qwen3_vl_vision", **DEEPSTACK},
        **QWEN,
    )
    return hf.Cosmos3OmniForConditionalGeneration(config)


def cosmos_edge() -> PreTrainedModel:
    config = hf.Cosmos3EdgeConfig(
        text_config={**GATED, "head_dim": 8, "rope_parameters": ROTARY},
        vision_config={**PLAIN, "num_patches": 16},
        projector_hidden_size=32,
        **QWEN,
    )
    return hf.Cosmos3EdgeForConditionalGeneration(config)


def paddle_ocr() -> PreTrainedModel:
    config = hf.PaddleOCRVLConfig(
        text_config={**GATED, "head_dim": 8, "rope_parameters": ROTARY},
        vision_config={**PLAIN, "image_size": 24},
        **QWEN,
    )
    return hf.PaddleOCRVLForConditionalGeneration(config)


# --- Others with patches of all images in one list


def exaone(window: int | None = None) -> PreTrainedModel:
    text = {**GATED, "num_hidden_layers": 4, "sliding_window": window}
    layers = SLIDING["layer_types"] if window else ["full_attention"] * 4
    config = hf.Exaone4_5_Config(
        text_config={"model_type": "exaone4", **text, "layer_types": layers},
        vision_config={**WINDOWS, "num_key_value_heads": 2},
        **VISUAL,
    )
    return hf.Exaone4_5_ForConditionalGeneration(config)


def hyperclova() -> PreTrainedModel:
    config = hf.HyperCLOVAXVisionV2Config(
        text_config={"model_type": "hyperclovax", **GATED},
        vision_config={"model_type": "qwen2_5_vl_vision", **WINDOWS},
        **VISUAL,
    )
    return hf.HyperCLOVAXVisionV2ForConditionalGeneration(config)


def minimax(sparse: bool = False) -> PreTrainedModel:
    """Return a MiniMax-M3; with `sparse` its layers read blocks of keys chosen by an index, as the published one's."""
    layers = ["full_attention", *["minimax_m3_sparse" if sparse else "full_attention"] * 2]
    text = {
        **GATED,
        "intermediate_size": 16,
        "dense_intermediate_size": 32,
        "shared_intermediate_size": 16,
        "head_dim": 8,
        "rotary_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "layer_types": layers,
        "index_head_dim": 8,
    }
    config = hf.MiniMaxM3VLConfig(
        text_config=text,
        vision_config={**PLAIN, "hidden_size": 48, "image_size": 24},
        projector_hidden_size=32,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )
    return in_float64(hf.MiniMaxM3SparseForConditionalGeneration(config))


def video_llama3() -> PreTrainedModel:
    text = {"model_type": "qwen2", **GATED}
    return hf.VideoLlama3ForConditionalGeneration(hf.VideoLlama3Config(text_config=text, vision_config=PLAIN, **VISUAL))


def squares(time: int, height: int, width: int, seed: int, side: int) -> Image:
    """Return an image or a video of VideoLLaMA 3, which says itself that `side` squared patches make a token."""
    plain = grid(time, height, width, seed, (48,), side)
    name = "video_merge_sizes" if time > 1 else "image_merge_sizes"
    return replace(plain, tensors={**plain.tensors, name: torch.tensor(side)})


def compressed(video: Image, stays: Sequence[int]) -> Image:
    """Return a video without the tokens that resemble the frame before, as its processor makes it; `stays`: 1 or 0."""
    mask = torch.tensor(stays, dtype=torch.bool)
    return replace(video, tokens=int(mask.sum()), tensors={**video.tensors, "video_compression_mask": mask})


def video_llama3_images(*last: Image) -> list[list[Image]]:
    return [[squares(1, 4, 6, 0, 1)], [squares(1, 4, 4, 1, 2), squares(1, 6, 4, 2, 2)], list(last), []]


def compressed_videos() -> list[list[Image]]:
    """Return images and two compressed videos, of which the second has a frame of one token and one of none."""
    videos = [squares(2, 4, 4, 3, 2), squares(3, 4, 4, 4, 2)]
    stays = [[1] * 8, [1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0]]
    return video_llama3_images(*(compressed(video, own) for video, own in zip(videos, stays, strict=True)))


def video_llama3_inputs(samples: Sequence[Sample], text: Inputs) -> Inputs:
    name = "video_compression_mask"
    found = {**each_image(samples, text, torch.cat)}
    masks = [image.tensors[name] for sample in samples for image in sample.images if name in image.tensors]
    return {**found, name: torch.cat(masks)} if masks else found


# --- Mistral's layout


def lighton_ocr() -> PreTrainedModel:
    config = hf.LightOnOcrConfig(
        vision_config={**TOWER, "model_type": "pixtral", "image_size": 64, "patch_size": 4},
        text_config={"model_type": "qwen3", **GATED, "head_dim": 8},
        spatial_merge_size=2,
        image_token_id=IMAGE,
    )
    return hf.LightOnOcrForConditionalGeneration(config)
