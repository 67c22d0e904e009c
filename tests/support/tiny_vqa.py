"""A tiny random BLIP-2 with its processor, and digit scenes, saved in folders as a user would have them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from catp_lightning.data.scenes import write_scenes
from catp_lightning.data.vqa import VQASplit

QUERIES, SIZE = 4, 64
WORDS = (
    "question short answer : ? how many digits are there is a what the largest smallest digit which in row column "
    "yes no none 0 1 2 3 4 5 6 7 8 9"
)


def build_processor() -> Blip2Processor:
    words = ["<pad>", "</s>", "<unk>", "<image>", *WORDS.split()]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )
    images = BlipImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return Blip2Processor(images, fast, num_query_tokens=QUERIES)


def build_model(text: PretrainedConfig, seed: int = 0) -> Blip2ForConditionalGeneration:
    side = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**side, image_size=SIZE, patch_size=16, initializer_range=0.5).to_dict(),
        qformer_config=Blip2QFormerConfig(
            **side, vocab_size=40, cross_attention_frequency=1, encoder_hidden_size=16, initializer_range=0.5
        ).to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Blip2ForConditionalGeneration(config)
        torch.nn.init.normal_(model.query_tokens)
        # Weights this large make answers depend on the image and the question, so a wrong batch cannot pass unseen.
        for parameter in (*model.language_model.parameters(), *model.language_projection.parameters()):
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.7)
    return model.eval()


def opt_config() -> OPTConfig:
    return OPTConfig(
        vocab_size=4 + len(WORDS.split()), hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip


def t5_config() -> T5Config:
    return T5Config(
        vocab_size=4 + len(WORDS.split()), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip


def save_model(folder: Path, text: PretrainedConfig) -> str:
    build_model(text).save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return str(folder)


def scenes(folder: Path, questions: int, annotated: bool = True) -> VQASplit:
    write_scenes(folder, "test", questions)
    annotations = str(folder / "annotations.json") if annotated else None
    return VQASplit(str(folder / "questions.json"), str(folder / "images"), annotations, "{image_id:012d}.png")
