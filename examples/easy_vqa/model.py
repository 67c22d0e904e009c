"""A small LLaVA with random weights: a CLIP tower, a projector and a Llama, with a tokenizer of easy-VQA's words."""

import torch
from scenes import ANSWERS, CELL, PLACES, SIDE
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WIDTH, LAYERS, HEADS = 64, 4, 4
PATCH = 8  # pixels a side: three rows of three patches to an image of a scene
GRID = SIDE * CELL // PATCH  # patches a side
FEATURE_LAYER = -2  # as LLaVA-1.5
PROMPT = "<image> {}"
PAD, END, UNKNOWN, IMAGE = "<pad>", "</s>", "<unk>", "<image>"
ASKED = "what is are the a an of there not no in does contain present color shape image ?".split()  # noqa: SIM905


def build_processor() -> LlavaProcessor:
    words = dict.fromkeys([PAD, END, UNKNOWN, IMAGE, *ANSWERS, *PLACES, *ASKED])
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, padding_side="left"
    )
    fast.add_tokens([IMAGE], special_tokens=True)
    pixels = SIDE * CELL
    return LlavaProcessor(
        CLIPImageProcessor(
            size={"shortest_edge": pixels},
            crop_size={"height": pixels, "width": pixels},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    ids = processor.tokenizer.get_vocab()
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "initializer_range": WIDTH**-0.5,  # 0.02 is for models ten times as wide
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=SIDE * CELL, patch_size=PATCH),
        text_config=LlamaConfig(
            **sizes,
            vocab_size=len(ids),
            max_position_embeddings=512,
            pad_token_id=ids[PAD],
            bos_token_id=ids[END],
            eos_token_id=ids[END],
            tie_word_embeddings=True,
        ),
        image_token_index=ids[IMAGE],
        image_seq_length=GRID * GRID,
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    projector = model.model.multi_modal_projector
    for layer in (projector.linear_1, projector.linear_2):
        nn.init.normal_(layer.weight, std=WIDTH**-0.5)
    with torch.no_grad():  # positions begin as the sum of a row and a column: 18 places to learn, not 81
        row, column = torch.randn(2, GRID, 1, WIDTH) * 0.3
        places = (row + column.transpose(0, 1)).flatten(0, 1)
        model.model.vision_tower.embeddings.position_embedding.weight[1:] = places
    return model
