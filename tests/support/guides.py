"""A small LLaVA that guides others, and the policy that asks it."""

from typing import Any

import transformers as hf
from transformers import PreTrainedModel

from catp_lightning import PruningPolicy
from tests.support.families import GATED, TOKENS, clip

ANSWER = 4
RULE = PruningPolicy(scorer="sgl", scorer_args={"answer_tokens": ANSWER}, keep=0.4)


def small_llava(**changes: Any) -> PreTrainedModel:
    """Two layers of two heads, and another width than the large model's."""
    text = {**GATED, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = hf.LlavaConfig(vision_config=clip(), text_config=hf.LlamaConfig(**{**text, **changes}), **TOKENS)
    return hf.LlavaForConditionalGeneration(config)
