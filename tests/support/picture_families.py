"""More rows of the matrix: models that make the same number of tokens of every picture."""

from collections.abc import Sequence
from functools import partial

import torch

from tests.support.decoder_oracle import Decoder
from tests.support.families import GEMMA3_LACKS, OLDEST, TYPED, WRAP
from tests.support.oracles import IMAGE, Inputs
from tests.support.picture_models import (
    aria,
    aya_vision,
    cohere2_vision,
    deepseek_vl,
    deepseek_vl_hybrid,
    fast_vlm,
    fuyu,
    got_ocr2,
    idefics2,
    janus,
    ovis2,
    perception_lm,
    qianfan_ocr,
    shieldgemma2,
)
from tests.support.projector_models import video
from tests.support.rows import Row
from tests.support.samples import Image, Sample, each_image, each_sample, pictures, prompts, random_numbers

LARGE = (3, 48, 48)
UNEXPANDED = "transformers hands on the patches of one beam for all of them, and fails unpruned as well"
FUYU_LACKS = {} if OLDEST else {"beams_and_sampling_find_what_the_masked_model_finds": UNEXPANDED}


def in_two_sizes() -> list[list[Image]]:
    """Return DeepSeek-VL's images, which one tower reads small and another large."""
    return [
        [
            Image(one.tokens, {**one.tensors, "high_res_pixel_values": random_numbers(*LARGE, seed=50 + row + 10 * at)})
            for at, one in enumerate(own)
        ]
        for row, own in enumerate(pictures())
    ]


def tiled() -> list[list[Image]]:
    """Return PerceptionLM's images, of two tiles each, and a video."""
    images = pictures(18, (2, 3, 24, 24))
    return [images[0], images[1], [*images[2], video(27, 3, 24, 9)], []]


def lines(rows: int, columns: int, seed: int) -> Image:
    return Image(rows * columns, {"pixel_values": random_numbers(rows * columns, 48, seed=seed)})


def fuyu_samples() -> list[Sample]:
    """Return prompts of one image each, with a token of text at the end of a line."""
    sizes, samples = ((3, 4), (4, 5), (2, 6)), prompts([[lines(3, 4, 0)], [lines(4, 5, 1)], [lines(2, 6, 2)], []])
    for sample, (rows, columns) in zip(samples, sizes, strict=False):
        start = sample.ids.index(IMAGE)
        sample.ids[start : start + rows * columns] = ([IMAGE] * columns + [96]) * rows
    return samples


def patches(samples: Sequence[Sample], text: Inputs) -> Inputs:
    """Return Fuyu's tensors; patches were the argument image_patches before transformers 5.2x."""
    inputs = each_image(samples, text, torch.cat)
    name = "image_patches" if OLDEST else "pixel_values"
    return {name: inputs["pixel_values"]} if inputs else {}


PICTURED = [
    Row("Aria", aria, lambda: prompts(pictures()), Decoder()),
    Row("AyaVision", aya_vision, lambda: prompts(pictures(9, LARGE)), Decoder()),
    Row("Cohere2Vision", cohere2_vision, lambda: prompts(pictures(9, LARGE)), Decoder()),
    Row("DeepseekVL", deepseek_vl, lambda: prompts(pictures()), Decoder()),
    Row("DeepseekVL-hybrid", deepseek_vl_hybrid, lambda: prompts(in_two_sizes()), Decoder()),
    Row("FastVLM", fast_vlm, lambda: prompts(pictures()), Decoder()),
    Row("Fuyu", fuyu, fuyu_samples, Decoder(), patches, lacks=FUYU_LACKS),
    Row("GotOcr2", got_ocr2, lambda: prompts(pictures(9, LARGE)), Decoder()),
    Row("PPChart2Table", partial(got_ocr2, "PPChart2Table"), lambda: prompts(pictures(9, LARGE)), Decoder()),
    Row("Idefics2", idefics2, lambda: prompts(pictures(5)), Decoder("model.text_model"), each_sample),
    Row("Janus", janus, lambda: prompts(pictures()), Decoder()),
    Row("Ovis2", ovis2, lambda: prompts(pictures(), wrap=(91, 93)), Decoder()),
    Row("PerceptionLM", perception_lm, lambda: prompts(tiled()), Decoder()),
    Row("QianfanOCR", qianfan_ocr, lambda: prompts(pictures()), Decoder()),
    Row("ShieldGemma2", shieldgemma2, lambda: prompts(pictures(), wrap=WRAP), Decoder(), TYPED, lacks=GEMMA3_LACKS),
]
