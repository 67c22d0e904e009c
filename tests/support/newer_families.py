"""More rows of the matrix in families.py: small random models whose images are laid out as Qwen-VL's or Mistral's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

from tests.support.families import (
    GATED,
    OLDEST,
    PATCHES,
    QWEN,
    QWEN_INPUTS,
    QWEN_LACKS,
    ROTARY,
    SLIDING,
    TOWER,
    WRAP,
    Image,
    Row,
    Sample,
    apart,
    each_image,
    grid,
    grids,
    prompts,
    qwen3_vl,
    random_numbers,
    sized,
)
from tests.support.oracles import END, IMAGE, START, VIDEO, Decoder, Inputs

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


PACKED = partial(each_image, join=torch.cat)
ROTATED = Decoder(coordinates=True)
IN_COLUMNS = 2e-6  # generate counts columns, padding included, as positions, with rotary angles in float32
IN_ROUTER = 1e-7  # experts are weighed in float32


UNSPLIT = "transformers then splits the features of videos by another count of tokens, and fails unpruned as well"
EXPANDED = {"beams_and_sampling_find_what_the_masked_model_finds": UNSPLIT}
VIDEOS_5_13 = EXPANDED if OLDEST else {}
COMPRESSED_LACKS = {} if OLDEST else EXPANDED
SEEN = "in transformers 5.13 the images of a batch see each other in its tower, unpruned as well"
MINIMAX_LACKS = {
    "a_sample_does_not_depend_on_its_batch_or_padding": SEEN,
    "compact_positions_equal_a_prompt_physically_shortened": SEEN,
}
GLM_VIDEO_LACKS = {
    **EXPANDED,
    "embeddings_without_ids_are_refused": "transformers fails before: it looks for another token than ids have",
}


def _row(
    name: str,
    kind: str,
    make: Callable[[], PreTrainedModel],
    images: Callable[[], list[list[Image]]],
    oracle: Decoder = ROTATED,
    join: Callable[[Sequence[Sample], Inputs], Inputs] = QWEN_INPUTS,
    rounding: float = 0.0,
    lacks: Mapping[str, str] = MappingProxyType({}),
    change: Callable[[list[Sample]], list[Sample]] = list,
    known: bool = True,
) -> list[Row]:
    """Return a list of one row; [] if transformers lacks the class `kind`, or has it in another form (not `known`)."""
    lacks = {**(QWEN_LACKS if oracle.coordinates else {}), **lacks}
    row = Row(name, make, lambda: change(prompts(images(), wrap=WRAP)), oracle, join, rounding=rounding, lacks=lacks)
    return [row] if known and hasattr(hf, f"{kind}ForConditionalGeneration") else []


def _with_video() -> list[list[Image]]:
    return grids(grid(2, 4, 4, 3))


def _with_frames(patch: tuple[int, ...] = (96,)) -> list[list[Image]]:
    return grids(*apart(grid(2, 4, 4, 3, patch)), patch=patch)


def _images(patch: tuple[int, ...] = (96,)) -> list[list[Image]]:
    return grids(grid(1, 6, 6, 3, patch), patch=patch)


NEWER = [
    *_row("GLM-4V", "Glm4v", partial(glm, "Glm4v"), _images),
    *_row(
        "GLM-4V, videos",
        "Glm4v",
        partial(glm, "Glm4v"),
        lambda: [glm_video(0), glm_video(1), []],
        join=glm_videos,
        lacks=GLM_VIDEO_LACKS,
    ),
    *_row("GLM-4V-MoE", "Glm4vMoe", glm_moe, _images, rounding=IN_ROUTER),
    *_row("GLM-4.6V", "Glm46V", partial(glm, "Glm46V"), _images),
    *_row("GLM-GA", "Glm46V", partial(glm, "Glmga"), _images, known=hasattr(hf, "GlmgaConfig")),
    *_row("GLM-OCR", "GlmOcr", partial(glm, "GlmOcr", head_dim=8), _images),
    *_row("Qwen3-VL, videos", "Qwen3VL", qwen3_vl, _with_frames),
    *_row("Qwen3-VL-MoE", "Qwen3VLMoe", qwen3_vl_moe, _with_frames),
    *_row(
        "Qwen2.5-Omni",
        "Qwen2_5OmniThinker",
        qwen2_5_omni,
        _with_video,
        join=omni_inputs,
        change=partial(heard, tokens=5),
        known=not OLDEST,  # in 5.13 its towers are attributes of the head
    ),
    *_row(
        "Qwen3-Omni-MoE",
        "Qwen3OmniMoeThinker",
        qwen3_omni,
        _with_video,
        join=omni_inputs,
        change=partial(heard, tokens=3),
        known=not OLDEST,
    ),
    *_row(
        "VideoLLaMA3",
        "VideoLlama3",
        video_llama3,
        lambda: video_llama3_images(squares(2, 4, 4, 3, 2)),
        Decoder(),
        PACKED,
    ),
    *_row(
        "VideoLLaMA3, compressed videos",
        "VideoLlama3",
        video_llama3,
        compressed_videos,
        Decoder(),
        video_llama3_inputs,
        lacks=COMPRESSED_LACKS,
    ),
    *_row("PaddleOCR-VL", "PaddleOCRVL", paddle_ocr, partial(_images, (3, 4, 4))),
    *_row("EXAONE-4.5", "Exaone4_5_", exaone, _with_video, Decoder(), PACKED, IN_COLUMNS, VIDEOS_5_13),
    *_row(
        "EXAONE-4.5, sliding windows",
        "Exaone4_5_",
        partial(exaone, 12),
        _with_video,
        Decoder(),
        PACKED,
        IN_COLUMNS,
        VIDEOS_5_13,
    ),
    *_row("HyperCLOVAX-V2", "HyperCLOVAXVisionV2", hyperclova, _with_video, Decoder(), PACKED, IN_COLUMNS),
    *_row("LightOnOCR", "LightOnOcr", lighton_ocr, partial(sized, 8), Decoder(), each_image),
    *_row("Cosmos3-Omni", "Cosmos3Omni", cosmos_omni, _with_frames),
    *_row("Cosmos3-Edge", "Cosmos3Edge", cosmos_edge, partial(_with_frames, (48,))),
    *_row(
        "MiniMax-M3, full attention",
        "MiniMaxM3Sparse",
        minimax,
        _with_video,
        Decoder(),
        PACKED,
        IN_ROUTER,
        MINIMAX_LACKS if OLDEST else {},
    ),
]
