"""Measure the cost of `prune(model, PruningPolicy(keep=1.0))` against the plain model: prefill and decoding.

    OMP_NUM_THREADS=1 python -m benchmarks.overhead
    python -m benchmarks.overhead --families llava --rounds 5 --width 256

Random weights of real classes, so large that a decoding step takes at least 50 ms on one core. Every round has
a plain and a pruned run, which take turns in being the first; the table has the median of the rounds' ratios and the
95% bootstrap interval of that median.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    OPTConfig,
    PreTrainedModel,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from catp_lightning import PruningPolicy, prune
from catp_lightning.prompt.caches import cache_in, cache_name

VOCABULARY, IMAGE, TEXT = 1000, 999, 24
STEPS, RESAMPLES = 3, 10_000
Built = tuple[PreTrainedModel, dict[str, Tensor]]


def prompt(placeholders: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 900, (1, placeholders + TEXT))
    ids[:, 4 : 4 + placeholders] = IMAGE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def llava(width: int) -> Built:
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=6,
        num_attention_heads=16,
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE))
    return model, {**prompt(64), "pixel_values": torch.randn(1, 3, 64, 64)}


def blip2(width: int) -> Built:
    small = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=6,
        num_attention_heads=16,
    )
    config = Blip2Config(
        vision_config={**small, "image_size": 64, "patch_size": 8},
        qformer_config={**small, "encoder_hidden_size": 128},
        text_config=text.to_dict(),
        image_token_index=IMAGE,
    )
    return Blip2ForConditionalGeneration(config), {**prompt(32), "pixel_values": torch.randn(1, 3, 64, 64)}


def mllama(width: int) -> Built:
    """Build a Llama-3.2-Vision and an image of four tiles, none of them padding, so that no row can be left out."""
    vision = MllamaVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_global_layers=1,
        attention_heads=4,
        image_size=64,
        patch_size=16,
        max_num_tiles=4,
        vision_output_dim=256,
        intermediate_layers_indices=[0],
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1], [2, 2]],
    )
    text = MllamaTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=4,
        cross_attention_layers=[1, 4],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=0,
    )
    model = MllamaForConditionalGeneration(
        MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    )
    given = prompt(1)
    return model, {
        **given,
        "pixel_values": torch.randn(1, 1, 4, 3, 64, 64),
        "aspect_ratio_ids": torch.tensor([[4]]),
        "aspect_ratio_mask": torch.ones(1, 1, 4, dtype=torch.long),
        "cross_attention_mask": (torch.arange(given["input_ids"].shape[1]) >= 4)
        .long()[None, :, None, None]
        .repeat(1, 1, 1, 4),
    }


FAMILIES: dict[str, Callable[[int], Built]] = {"llava": llava, "blip-2": blip2, "mllama": mllama}


def timed(model: Any, inputs: Mapping[str, Tensor], pruned: bool) -> tuple[float, float]:
    """Return the seconds of one prefill, and of one decoding step, the mean of `STEPS`."""
    with prune(model, PruningPolicy(keep=1.0)) if pruned else nullcontext():
        start = time.perf_counter()
        output = model(**inputs, use_cache=True)
        prefill = time.perf_counter() - start
        cache = cache_in(getattr(output, "language_model_outputs", output))
        step = getattr(model, "language_model", model) if isinstance(model, Blip2ForConditionalGeneration) else model
        length, see = inputs["input_ids"].shape[1], inputs.get("cross_attention_mask")
        start = time.perf_counter()
        for number in range(STEPS):
            extra = {} if see is None else {"cross_attention_mask": see[:, -1:]}
            step(
                input_ids=torch.full((1, 1), 5),
                attention_mask=torch.ones(1, length + number + 1, dtype=torch.long),
                position_ids=torch.tensor([[length + number]]),
                **{cache_name(step.forward): cache},
                **extra,
            )
        return prefill, (time.perf_counter() - start) / STEPS


def measure(build: Callable[[int], Built], width: int, rounds: int, name: str) -> dict[str, list[tuple[float, float]]]:
    """Return (plain, pruned) seconds of each round by part; a first round warms up and does not count."""
    torch.manual_seed(0)
    model, inputs = build(width)
    model.eval()
    found: dict[str, list[tuple[float, float]]] = {"prefill": [], "decoding step": []}
    for number in track(range(rounds + 1), description=name):
        seconds = {pruned: timed(model, inputs, pruned) for pruned in ((False, True), (True, False))[number % 2]}
        if number:
            for part, pair in zip(found.values(), zip(seconds[False], seconds[True], strict=True), strict=True):
                part.append(pair)
    return found


def median_interval(ratios: list[float]) -> tuple[float, float, float]:
    """Return the median of ratios, and the 95% bootstrap interval of the median."""
    draws = np.random.default_rng(0).choice(np.array(ratios), (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return statistics.median(ratios), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--width", type=int, default=2048)
    arguments = parser.parse_args()
    table = Table("family", "part", "plain, median ms", "pruned at 1.0, ratio: median", "95% interval of the median")
    with torch.inference_mode():
        for name in arguments.families:
            for part, pairs in measure(FAMILIES[name], arguments.width, arguments.rounds, name).items():
                middle, low, high = median_interval([pruned / plain for plain, pruned in pairs])
                plain = statistics.median(plain for plain, _ in pairs)
                table.add_row(name, part, f"{plain * 1000:.0f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}")
    Console().print(f"width {arguments.width}, {arguments.rounds} rounds, {torch.get_num_threads()} threads")
    Console().print(table)


if __name__ == "__main__":
    main()
