"""Small random models of real classes, and inputs for them."""

from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
)

VOCABULARY, IMAGE, PAD = 100, 99, 1


@dataclass(frozen=True)
class Shape:
    """Shape of a BLIP-2: the three in `SHAPES` differ in every number that code could have wired in."""

    queries: int = 8
    patch: int = 8
    vision_layers: int = 2
    vision_heads: int = 4
    qformer_layers: int = 4
    frequency: int = 2
    qformer_heads: int = 4
    text_layers: int = 3
    text_heads: int = 4
    width: int = 64


SHAPES = {
    "8 queries": Shape(),
    "5 queries, every layer crosses": Shape(
        queries=5, frequency=1, qformer_layers=2, qformer_heads=2, text_layers=2, text_heads=8
    ),
    "12 queries, wider": Shape(
        queries=12, patch=16, vision_layers=3, qformer_layers=3, text_layers=4, text_heads=2, width=96
    ),
}
TINY = Shape(4, 16, 1, 2, 1, 1, 2, 2, 2, 16)


def random_blip2(
    seed: int = 0,
    shape: Shape = Shape(),
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    batch: int = 3,
    padded: bool = True,
) -> tuple[Blip2ForConditionalGeneration, dict[str, Tensor]]:
    """Return a random BLIP-2 with OPT and a batch of mixed lengths, padded between image and text as by its processor.

    Weights are larger than initialisation makes them: dropping a token must move the logits, or a test proves nothing.
    """
    return deepcopy(_made(seed, shape, dtype, attention, batch, padded))  # quicker than to make another


@cache
def _made(
    seed: int, shape: Shape, dtype: torch.dtype, attention: str, batch: int, padded: bool
) -> tuple[Blip2ForConditionalGeneration, dict[str, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vision = Blip2VisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=shape.vision_layers,
            num_attention_heads=shape.vision_heads,
            image_size=32,
            patch_size=shape.patch,
            initializer_range=0.1,
        )
        qformer = Blip2QFormerConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=shape.qformer_layers,
            num_attention_heads=shape.qformer_heads,
            encoder_hidden_size=32,
            cross_attention_frequency=shape.frequency,
            initializer_range=0.1,
        )
        text = OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=shape.width,
            ffn_dim=2 * shape.width,
            num_hidden_layers=shape.text_layers,
            num_attention_heads=shape.text_heads,
            max_position_embeddings=64,
            word_embed_proj_dim=shape.width,
            pad_token_id=PAD,
            bos_token_id=2,
            eos_token_id=2,
            init_std=0.15,
        )
        config = Blip2Config(
            vision_config=vision.to_dict(),
            qformer_config=qformer.to_dict(),
            text_config=text.to_dict(),
            num_query_tokens=shape.queries,
            image_token_index=IMAGE,
        )
        model = Blip2ForConditionalGeneration(config).eval()
        model.query_tokens.data.normal_()
        model.language_projection.weight.data.normal_(0, 0.5)
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "query.weight", "key.weight")):
                weight.data *= 2.5
            if "embed_positions" in name:
                weight.data.normal_(0, 0.5)
        model.to(dtype).set_attn_implementation(attention)
        return model, random_inputs(shape.queries, batch, padded, dtype)


def random_inputs(queries: int, batch: int, padded: bool, dtype: torch.dtype, length: int = 10) -> dict[str, Tensor]:
    ids = torch.randint(3, IMAGE - 1, (batch, queries + length))
    mask = torch.ones_like(ids)
    ids[:, :queries] = IMAGE
    if padded:
        for row in range(batch):
            pads = (2 * row + 3) % 5
            ids[row, queries : queries + pads], mask[row, queries : queries + pads] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(batch, 3, 32, 32).to(dtype)}


def faint_blip2(share: float = 0.05, **settings: Any) -> Blip2ForConditionalGeneration:
    """Return a random BLIP-2 whose images count for little, so that some answers survive pruning."""
    model, _ = random_blip2(**settings)
    model.language_projection.weight.data *= share
    return model


def greedily(most: int, least: int | None = None) -> dict[str, Any]:
    """Return settings of generate for answers of `most` tokens, or of `least` to `most`."""
    fewest = most if least is None else least
    return {"max_new_tokens": most, "min_new_tokens": fewest, "do_sample": False, "suppress_tokens": [IMAGE]}


GREEDY = greedily(10)
SHORT = greedily(3, 1)
ONE_LAYER = Shape(vision_layers=1, qformer_layers=1, frequency=1, text_layers=1)  # compiling costs time by the layer
