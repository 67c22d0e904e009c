"""A small model with its processor for each class that recipes are about, in a folder."""

from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from catp_lightning.data import shipped
from tests.support.tiny_vqa import WORDS

SIDE = 48
SHIPPED = {
    "catp-blip2-opt-2.7b": "digits_blip2",
    "fastervlm-llava-1.5-7b": "digits_llava",
    "trimmed-llama-3.2-11b-vision": "digits_mllama",
    "qwen2.5-vl-7b": "digits_qwen2_5_vl",
}
"""Recipes whose model has a small one of its class in the package."""


def small_model(recipe: str, folder: Path) -> str:
    """A small model of the class that a recipe is about, with its processor: a folder."""
    if recipe in SHIPPED:
        return str(shipped(SHIPPED[recipe]))
    if recipe.startswith("digits-"):
        return str(shipped(recipe.replace("-", "_")))
    return {"fastervlm-llava-next-7b": llava_next, "internvl3-8b": internvl}[recipe](folder)


def llava_next(folder: Path) -> str:
    """The shipped LLaVA's sizes and tokenizer as a LLaVA-NeXT, with random weights."""
    config = hf.AutoConfig.from_pretrained(shipped("digits_llava"))
    processor = hf.AutoProcessor.from_pretrained(shipped("digits_llava"))
    points = [[96, 192], [192, 96], [192, 192]]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.LlavaNextForConditionalGeneration(
            hf.LlavaNextConfig(
                vision_config=config.vision_config.to_dict(),
                text_config=config.text_config.to_dict(),
                image_token_id=config.image_token_id,
                image_grid_pinpoints=points,
                tie_word_embeddings=True,
            )
        )
    model.save_pretrained(folder)
    images = hf.LlavaNextImageProcessor(
        size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96}, image_grid_pinpoints=points
    )
    hf.LlavaNextProcessor(
        images,
        processor.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return str(folder)


def internvl(folder: Path) -> str:
    """A random InternVL whose images are one tile of 36 tokens.

    LLaVA's processor stands in for its own, which needs torchvision; both put image tokens where <IMG_CONTEXT> stands.
    """
    words = ["<pad>", "</s>", "<unk>", "<IMG_CONTEXT>", *dict.fromkeys(WORDS.split())]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<IMG_CONTEXT>"],
    )
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = hf.Qwen2Config(
        vocab_size=len(words), hidden_size=24, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    config = hf.InternVLConfig(
        vision_config={**vision, "image_size": [SIDE, SIDE], "patch_size": [4, 4]},
        text_config=text,
        image_token_id=words.index("<IMG_CONTEXT>"),
        image_seq_length=36,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf.InternVLForConditionalGeneration(config).save_pretrained(folder)
    images = hf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    hf.LlavaProcessor(
        images, fast, patch_size=8, vision_feature_select_strategy="full", image_token="<IMG_CONTEXT>"
    ).save_pretrained(folder)
    return str(folder)
