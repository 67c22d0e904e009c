"""Small random models whose visual tokens are queries, or rows that text attends to; and samples for them."""

from functools import partial
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from tests.support.oracles import IMAGE, PAD, VIDEO
from tests.support.samples import Image, Sample, _words, random_numbers
from tests.support.small_configs import GATED, TEXT, TOKENS, TOWER

# --- BLIP-2 and InstructBLIP

QFORMER = {**TOWER, "num_hidden_layers": 2, "encoder_hidden_size": 32, "cross_attention_frequency": 1}
OPT = {**TEXT, "ffn_dim": 64, "num_hidden_layers": 3, "word_embed_proj_dim": 32}
T5 = {
    "vocab_size": 120,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": PAD,
    "pad_token_id": PAD,
    "eos_token_id": None,
    "relative_attention_max_distance": 20,
}
QUERIES = 8


def blip(kind: str, text: Any, queries: int = QUERIES) -> PreTrainedModel:
    """Return a model of `kind` Blip2, InstructBlip or InstructBlipVideo."""
    part = partial(getattr, hf)
    qformer = {name: value for name, value in QFORMER.items() if name not in ("image_size", "patch_size")}
    placeholder = {"video_token_index": VIDEO} if kind.endswith("Video") else TOKENS
    config = part(f"{kind}Config")(
        vision_config=part(f"{kind}VisionConfig")(**{**TOWER, "num_hidden_layers": 2}).to_dict(),
        qformer_config=part(f"{kind}QFormerConfig")(**qformer, vocab_size=120).to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=queries,
        **placeholder,
    )
    return part(f"{kind}ForConditionalGeneration")(config)


def blip_samples(asked: bool = False, frames: int = 0, right: bool = False) -> list[Sample]:
    """Return samples as processors of BLIP-2 make them, which pad the text and put the image tokens before it.

    Pads stand between image and text, and where the tokenizer pads on the `right`, as T5's does, at the end.
    """
    generator = torch.Generator().manual_seed(7)
    samples = []
    for row, length in enumerate((6, 9, 7)):
        tensors = {"pixel_values": random_numbers(*([frames] if frames else []), 3, 24, 24, seed=row)}
        if asked:
            question = torch.randint(3, 90, (3 + row,), generator=generator)
            tensors |= {"qformer_input_ids": question, "qformer_attention_mask": torch.ones_like(question)}
        image = Image(QUERIES, tensors, VIDEO if frames else IMAGE)
        ids = [image.placeholder] * QUERIES + _words(length, generator)
        samples.append(Sample(ids, [image], pads_at=len(ids) if right else QUERIES))
    return samples


# --- Llama-3.2-Vision


def mllama() -> PreTrainedModel:
    vision = MllamaVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=4,
        image_size=16,
        patch_size=8,
        max_num_tiles=4,
        vision_output_dim=64,
        intermediate_layers_indices=[0],
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1], [2, 2]],
    )
    text = MllamaTextConfig(
        **{**GATED, "num_hidden_layers": 6},
        cross_attention_layers=[1, 3, 5],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    config = hf.MllamaConfig(vision_config=vision, text_config=text, **TOKENS)
    return hf.MllamaForConditionalGeneration(config)
