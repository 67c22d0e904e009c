"""Small random models that make the same number of tokens of every picture."""

from typing import Any

import transformers as hf
from transformers import PreTrainedModel

from tests.support.newer_models import in_float64
from tests.support.oracles import IMAGE, VIDEO
from tests.support.projector_models import SLIDING
from tests.support.small_configs import GATED, TOKENS, TOWER, siglip

LLAMA: dict[str, Any] = {"model_type": "llama", **GATED}
QWEN2: dict[str, Any] = {"model_type": "qwen2", **GATED}
LAYERS: dict[str, Any] = {name: SLIDING[name] for name in ("sliding_window", "num_hidden_layers", "layer_types")}
SAM: dict[str, Any] = {  # a Segment Anything tower: attention in windows, and of everything in some layers
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "mlp_dim": 64,
    "output_channels": 32,
    "window_size": 2,
    "global_attn_indexes": [1],
    "initializer_range": 0.02,
}


def aria() -> PreTrainedModel:
    text = {**GATED, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1, "intermediate_size": 16}
    config = hf.AriaConfig(
        text_config=hf.AriaTextConfig(**text),
        vision_config=hf.Idefics3VisionConfig(**{**TOWER, "patch_size": 4}),
        projector_patch_to_query_dict={36: 9},
        **TOKENS,
    )
    return in_float64(hf.AriaForConditionalGeneration(config))


def aya_vision() -> PreTrainedModel:
    text = hf.Cohere2Config(**{**GATED, **LAYERS})
    config = hf.AyaVisionConfig(vision_config=siglip(image_size=48), text_config=text, downsample_factor=2, **TOKENS)
    return hf.AyaVisionForConditionalGeneration(config)


def cohere2_vision() -> PreTrainedModel:
    config = hf.Cohere2VisionConfig(
        vision_config=siglip(image_size=48),
        text_config=hf.Cohere2Config(**{**GATED, **LAYERS}),
        downsample_factor=2,
        alignment_intermediate_size=64,
        image_token_id=IMAGE,
    )
    return hf.Cohere2VisionForConditionalGeneration(config)


def deepseek_vl() -> PreTrainedModel:
    config = hf.DeepseekVLConfig(text_config=LLAMA, vision_config=siglip().to_dict(), image_token_id=IMAGE)
    return hf.DeepseekVLForConditionalGeneration(config)


def deepseek_vl_hybrid() -> PreTrainedModel:
    config = hf.DeepseekVLHybridConfig(
        text_config=LLAMA,
        vision_config=siglip().to_dict(),
        high_res_vision_config={"model_type": "sam_vision_model", **SAM, "image_size": 48, "patch_size": 4},
        image_token_id=IMAGE,
    )
    return hf.DeepseekVLHybridForConditionalGeneration(config)


def fast_vlm() -> PreTrainedModel:
    """Return a FastVLM with a small tower of Segment Anything; the published one is of timm, and gives maps as well."""
    vision = {"model_type": "sam_vision_model", **SAM, "image_size": 24, "patch_size": 8}
    return hf.FastVlmForConditionalGeneration(hf.FastVlmConfig(text_config=QWEN2, vision_config=vision, **TOKENS))


def fuyu() -> PreTrainedModel:
    text = {name: GATED[name] for name in GATED if name != "num_key_value_heads"}
    config = hf.FuyuConfig(
        text_config={"model_type": "persimmon", **text},
        hidden_size=GATED["hidden_size"],
        patch_size=4,
        num_channels=3,
        image_token_id=IMAGE,
    )
    return hf.FuyuForCausalLM(config)


def got_ocr2(kind: str = "GotOcr2") -> PreTrainedModel:
    config = getattr(hf, f"{kind}Config")(
        text_config=QWEN2, vision_config={**SAM, "image_size": 48, "patch_size": 4}, **TOKENS
    )
    return hf.GotOcr2ForConditionalGeneration(config)


def idefics2() -> PreTrainedModel:
    perceiver = {
        "resampler_n_latents": 5,
        "resampler_depth": 1,
        "resampler_n_heads": 4,
        "resampler_head_dim": 8,
        "num_key_value_heads": 2,
    }
    config = hf.Idefics2Config(
        text_config={"model_type": "mistral", **GATED, "sliding_window": None},
        vision_config=dict(TOWER),
        perceiver_config=perceiver,
        image_token_id=IMAGE,
    )
    return hf.Idefics2ForConditionalGeneration(config)


def janus() -> PreTrainedModel:
    vision = {**TOWER, "num_hidden_layers": 2, "projection_dim": 32, "mlp_ratio": 2}
    quantised = {
        "embed_dim": 8,
        "num_embeddings": 16,
        "latent_channels": 32,
        "base_channels": 32,
        "channel_multiplier": [1],
        "num_res_blocks": 1,
        "projection_dim": 32,
        "image_token_embed_dim": 32,
    }
    config = hf.JanusConfig(text_config=LLAMA, vision_config=vision, vq_config=quantised, image_token_id=IMAGE)
    return hf.JanusForConditionalGeneration(config)


def ovis2() -> PreTrainedModel:
    vision = {**TOWER, "vocab_size": 40, "hidden_stride": 2, "patch_size": 4}
    config = hf.Ovis2Config(
        text_config=QWEN2,
        vision_config=vision,
        image_token_id=IMAGE,
        visual_indicator_token_ids=[91, 92, 93, 94, 95],
        vocab_size=GATED["vocab_size"],
        hidden_size=GATED["hidden_size"],
    )
    return hf.Ovis2ForConditionalGeneration(config)


def perception_lm() -> PreTrainedModel:
    config = hf.PerceptionLMConfig(
        text_config=LLAMA,
        vision_config=siglip(patch_size=4, model_args={"embed_dim": 32}),  # the published tower is one of timm's
        vision_use_cls_token=False,
        projector_pooling_ratio=2,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return hf.PerceptionLMForConditionalGeneration(config)


def qianfan_ocr() -> PreTrainedModel:
    config = hf.QianfanOCRConfig(
        text_config={"model_type": "qwen3", **GATED, "head_dim": 8},
        vision_config={**TOWER, "patch_size": 4},
        image_token_id=IMAGE,
    )
    return hf.QianfanOCRForConditionalGeneration(config)


def shieldgemma2() -> PreTrainedModel:
    config = hf.ShieldGemma2Config(
        text_config=hf.Gemma3TextConfig(**{**GATED, **SLIDING}),
        vision_config=siglip(image_size=24, patch_size=4),
        mm_tokens_per_image=9,
        boi_token_index=112,
        eoi_token_index=113,
        **TOKENS,
    )
    return hf.Gemma3ForConditionalGeneration(config)
