"""The network: a BLIP-2 with random weights, under a module of the project's own."""

import torch
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
)

WORDS, IMAGE_WORD, PAD = 60, 59, 1
QUERIES, SIZE = 8, 32


def build_vlm() -> Blip2ForConditionalGeneration:
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**layers, image_size=SIZE, patch_size=8, initializer_range=0.2).to_dict(),
        qformer_config=Blip2QFormerConfig(
            **layers, vocab_size=WORDS, encoder_hidden_size=32, cross_attention_frequency=1, initializer_range=0.2
        ).to_dict(),
        text_config=OPTConfig(
            vocab_size=WORDS, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64, init_std=0.2, pad_token_id=PAD, bos_token_id=2,
            eos_token_id=2, dropout=0.0,
        ).to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_WORD,
    )  # fmt: skip
    model = Blip2ForConditionalGeneration(config)
    nn.init.normal_(model.query_tokens)
    nn.init.normal_(model.language_projection.weight, std=0.5)
    return model


class Reader(nn.Module):
    """Reads a picture and a question."""

    def __init__(self) -> None:
        super().__init__()
        self.vlm = build_vlm()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, pixels: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.vlm(pixel_values=pixels, input_ids=words, attention_mask=mask).logits
        return logits[:, -1] / self.temperature

    def say(self, pixels: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        spoken: Tensor = self.vlm.generate(
            pixel_values=pixels, input_ids=words, attention_mask=mask, max_new_tokens=4, do_sample=False
        )
        return spoken
