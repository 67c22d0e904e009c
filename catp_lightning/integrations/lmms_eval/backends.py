"""Which of lmms-eval's own models answers for a Hugging Face model."""

from typing import Any

from transformers import AutoConfig

BACKENDS = {
    "gemma3": "gemma3",
    "instructblip": "instructblip",
    "internvl": "internvl_hf",
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "llava_onevision": "llava_hf",
    "mllama": "llama_vision",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl",
    "qwen3_5": "qwen3_5",
    "qwen3_5_moe": "qwen3_5",
}
"""Name of the lmms-eval model, by model type; other types are run by its `huggingface`."""


def backend_of(pretrained: str, **options: Any) -> str:
    """Return the name of the lmms-eval model that runs a folder or repository; `options` are of `AutoConfig`."""
    config = AutoConfig.from_pretrained(pretrained, **options)
    return BACKENDS.get(config.model_type, "huggingface")
