"""Configurations of small parts, which models of several families share."""

from typing import Any

import transformers as hf

from tests.support.oracles import IMAGE, PAD

TEXT: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,  # answers have the length they are asked for
    "max_position_embeddings": 256,
}
GATED: dict[str, Any] = {**TEXT, "intermediate_size": 64, "num_hidden_layers": 3, "num_key_value_heads": 2}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}
TOKENS: dict[str, int] = {"image_token_index": IMAGE}


def clip(**changes: Any) -> hf.CLIPVisionConfig:
    return hf.CLIPVisionConfig(**{**TOWER, **changes})


def siglip(**changes: Any) -> hf.SiglipVisionConfig:
    return hf.SiglipVisionConfig(**{**TOWER, "vision_use_head": False, **changes})
