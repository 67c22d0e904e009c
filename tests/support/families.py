"""Rows of the matrix of test_families.py: a model of every family, and prompts for it."""

from functools import partial

import torch
import transformers as hf

from tests.support.decoder_oracle import Decoder
from tests.support.encoder_oracles import CrossAttention, EncoderDecoder
from tests.support.grid_models import grid, grids, mistral3, pixtral, qwen2_5_vl, qwen2_vl, qwen3_vl, sized
from tests.support.oracles import END, IMAGE, START
from tests.support.projector_models import (
    crops,
    gemma2,
    gemma3,
    idefics,
    internvl,
    llava,
    llava_next,
    llava_next_video,
    llava_onevision,
    onevision_images,
    paligemma,
    several_crops,
    video,
    video_llava,
    video_llava_inputs,
    vip_llava,
)
from tests.support.query_models import OPT, QUERIES, T5, blip, blip_samples, mllama
from tests.support.rows import Row
from tests.support.samples import (
    all_prefix,
    each_sample,
    mllama_samples,
    pictures,
    prompts,
    tiles,
    with_counts,
    with_types,
)
from tests.support.small_configs import GATED

QWEN_INPUTS = partial(with_types, name="mm_token_type_ids", join=torch.cat)
TYPED = partial(with_types, name="token_type_ids")
WRAP = (START, END)
OPT_STACK = Decoder("language_model.model.decoder", "language_model")
LLAMA_STACK = Decoder("language_model.model", "language_model")
PREFIX = Decoder(first_position=1, first_type=1)
FIRST = (0, 0, 0, 0)  # PaliGemma's images come before all text
NO_POSITIONS = "transformers hands position ids given to forward to the Q-Former, which has no use for them and fails"
VIDEO_LACKS = {
    "a_loop_by_hand_without_a_cache_equals_generate": NO_POSITIONS,
    "a_decoding_loop_by_hand_equals_generate": NO_POSITIONS,
}
QWEN_LACKS = {
    "a_decoding_loop_by_hand_without_position_ids_equals_the_masked_loop": "transformers then makes position ids of "
    "the whole mask for the one new token, and fails unpruned as well",
}
MLLAMA_LACKS = {
    "embeddings_without_ids_are_refused": "its rows are found from cross_attention_mask, not from ids",
    "a_loop_by_hand_without_a_cache_equals_generate": "each call is a prompt of its own, whose first cross-attention "
    "layer reads every row; generated text reads what is cached",
}
OLDEST = hf.__version__.startswith("5.13.")
T5_ATTENTION = "eager" if OLDEST else "sdpa"  # transformers 5.13 knows no other for T5
FAILS_BEFORE = "transformers fails before, unpruned as well: it makes masks of a static cache wrongly"
STATIC_LACKS = dict.fromkeys(
    ("a_static_cache_is_refused_where_it_would_hold_visual_tokens", "a_static_cache_is_refused"), FAILS_BEFORE
)
TURNS = (
    "text_turns_equal_the_same_chat_under_a_mask",
    "an_image_in_the_second_turn_is_pruned_on_top_of_the_cache",
    "a_forward_call_with_an_image_on_a_pruned_cache_equals_the_masked_one",
)
SEVERAL = "transformers 5.13 makes masks of several columns on a full window wrongly, unpruned as well"
GEMMA3_LACKS = {**STATIC_LACKS, **dict.fromkeys(TURNS, SEVERAL)} if OLDEST else {}
UNCACHED = "in transformers 5.13 what is generated without a cache belongs to the prefix, unpruned as well"
WITHOUT_A_CACHE = (
    "decoding_without_a_cache_equals_cached_decoding",
    "attention_decides_the_same_for_beams_and_without_a_cache",
)
PALIGEMMA_LACKS = dict.fromkeys(WITHOUT_A_CACHE, UNCACHED) if OLDEST else {}
GEMMA2_LACKS = {**STATIC_LACKS, **PALIGEMMA_LACKS}
UNKNOWN_LACKS = {
    **GEMMA3_LACKS,
    "embeddings_without_ids_are_refused": "an id outside the vocabulary has no embedding to give",
}
ROWS = [
    Row("Llava", llava, lambda: prompts(pictures()), Decoder()),
    Row("VipLlava", vip_llava, lambda: prompts(pictures()), Decoder()),
    Row("LlavaNext", llava_next, lambda: prompts(several_crops()), Decoder()),
    Row(
        "LlavaNextVideo",
        llava_next_video,
        lambda: prompts([[crops(14, (15, 32), 3, 0)], [video(6, 6, 16, 1)], []]),
        Decoder(),
    ),
    Row("LlavaOnevision", llava_onevision, lambda: prompts(onevision_images()), Decoder(), with_counts),
    Row(
        "LlavaOnevision-video",
        llava_onevision,
        lambda: prompts([[video(9, 2, 24, 0)], [crops(21, (48, 15), 3, 1, 24), video(9, 2, 24, 2)], []]),
        Decoder(),
        with_counts,
    ),
    Row(
        "VideoLlava",
        video_llava,
        lambda: prompts([pictures()[0], [video(20, 2, 24, 7)], [*pictures()[2], video(20, 2, 24, 8)]]),
        Decoder(),
        video_llava_inputs,
    ),
    Row("Blip2-OPT", partial(blip, "Blip2", hf.OPTConfig(**OPT)), blip_samples, OPT_STACK),
    Row(
        "Blip2-T5",
        partial(blip, "Blip2", hf.T5Config(**T5)),
        partial(blip_samples, right=True),
        EncoderDecoder(),
        attention=T5_ATTENTION,
    ),
    Row(
        "InstructBlip",
        partial(blip, "InstructBlip", hf.LlamaConfig(**GATED)),
        partial(blip_samples, asked=True),
        LLAMA_STACK,
    ),
    Row(
        "InstructBlip-T5",
        partial(blip, "InstructBlip", hf.T5Config(**T5)),
        partial(blip_samples, asked=True, right=True),
        EncoderDecoder(),
        attention=T5_ATTENTION,
    ),
    Row(
        "InstructBlipVideo",
        partial(blip, "InstructBlipVideo", hf.LlamaConfig(**GATED), QUERIES // 2),
        partial(blip_samples, asked=True, frames=2),
        LLAMA_STACK,
        lacks=VIDEO_LACKS,
    ),
    Row(
        "Mllama",
        mllama,
        lambda: mllama_samples([(0, 10, 1)], [(4, 11, 2)], [(2, 7, 1), (7, 12, 4)], [(5, 13, 2)]),
        CrossAttention(),
        tiles,
        lacks=MLLAMA_LACKS,
    ),
    Row(
        "Mllama, last text that sees no image",
        mllama,
        lambda: mllama_samples([(3, 10, 1)], [(2, 7, 2)], [(1, 12, 4), (2, 12, 1)], []),
        CrossAttention(),
        tiles,
        lacks=MLLAMA_LACKS,
    ),
    Row(
        "Qwen2-VL",
        qwen2_vl,
        lambda: prompts(grids(grid(2, 4, 4, 3)), wrap=WRAP),
        Decoder(coordinates=True),
        QWEN_INPUTS,
        lacks=QWEN_LACKS,
    ),
    Row(
        "Qwen2.5-VL",
        qwen2_5_vl,
        lambda: prompts(grids(grid(2, 4, 4, 3)), wrap=WRAP),
        Decoder(coordinates=True),
        QWEN_INPUTS,
        lacks=QWEN_LACKS,
    ),
    Row(
        "Qwen3-VL",
        qwen3_vl,
        lambda: prompts(grids(grid(1, 6, 6, 3)), wrap=WRAP),
        Decoder(coordinates=True),
        QWEN_INPUTS,
        lacks=QWEN_LACKS,
    ),
    Row("InternVL", internvl, lambda: prompts(pictures()), Decoder()),
    Row("Gemma3", gemma3, lambda: prompts(pictures(), wrap=WRAP), Decoder(), TYPED, lacks=GEMMA3_LACKS),
    Row(
        "Gemma3, image token outside the vocabulary",
        partial(gemma3, IMAGE),
        lambda: prompts(pictures(), wrap=(90, 91)),
        Decoder(),
        TYPED,
        lacks=UNKNOWN_LACKS,
    ),
    Row(
        "PaliGemma",
        lambda: paligemma(hf.GemmaConfig(**GATED, head_dim=8)),
        lambda: prompts(pictures(), FIRST),
        PREFIX,
        all_prefix,
        lacks=PALIGEMMA_LACKS,
    ),
    Row(
        "PaliGemma2",
        lambda: paligemma(gemma2()),
        lambda: prompts(pictures(), FIRST),
        PREFIX,
        all_prefix,
        attention="eager",  # transformers has Gemma 2's capped attention in no other form
        lacks=GEMMA2_LACKS,
    ),
    Row("SmolVLM", partial(idefics, "SmolVLM"), lambda: prompts(pictures()), Decoder("model.text_model"), each_sample),
    Row(
        "Idefics3", partial(idefics, "Idefics3"), lambda: prompts(pictures()), Decoder("model.text_model"), each_sample
    ),
    Row("Mistral3", mistral3, lambda: prompts(sized(8)), Decoder()),
    Row("Mistral3, sliding window", partial(mistral3, 12), lambda: prompts(sized(8)), Decoder()),
    Row("Pixtral", pixtral, lambda: prompts(sized(4)), Decoder()),
]
BY_NAME = {row.name: row for row in ROWS}
