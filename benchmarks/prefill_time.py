"""Measure how well a profile predicts the prefill time of schedules that it was not made of.

    OMP_NUM_THREADS=1 python -m benchmarks.prefill_time
    OMP_NUM_THREADS=1 python -m benchmarks.prefill_time --models wide-llava --clock wall --seconds 60

The runs that a profile is made of and those of the schedules take turns on one batch, and the least time of each
counts. Where other programs keep the cores busy the wall clock measures those too: `--clock thread` counts the seconds
that the thread of the computation was given. The table has both times, and how far the prediction is off.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from catp_lightning import PruningPolicy
from catp_lightning.data import shipped
from catp_lightning.data.scenes import digit_pool, draw_scene
from catp_lightning.policy import Stage
from catp_lightning.pricing import Prompts
from catp_lightning.pricing.timing import Measurement, Run, Runs

Built = tuple[PreTrainedModel, dict[str, Any]]
PROFILED = [PruningPolicy(name) for name in ("l2-norm", "divprune", "fastv", "pyramiddrop", "visual-exit")]
IMAGES = {"digits_llava": "<image>", "digits_qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>"}


def schedules(depth: int) -> dict[str, PruningPolicy]:
    """Return schedules of other budgets and layers than those that were profiled, for a model of so many layers."""
    middle, late = depth // 2, depth - 1
    inside, leave = Stage("fastv", {"layer": middle}, keep=0.1), Stage("visual-exit", {"layer": late})
    return {
        "l2-norm, 0.3": PruningPolicy("l2-norm", keep=0.3),
        "divprune, 0.15": PruningPolicy("divprune", keep=0.15),
        "fastv at 1, 0.05": PruningPolicy("fastv", {"layer": 1}, keep=0.05),
        f"fastv at {late}, 0.5": PruningPolicy("fastv", {"layer": late}, keep=0.5),
        "pyramiddrop, 0.2": PruningPolicy("pyramiddrop", keep=0.2),
        f"visual-exit at {late}": PruningPolicy("visual-exit", {"layer": late}),
        f"l2-norm 0.4, fastv at {middle} 0.1": PruningPolicy("l2-norm", keep=0.4, then=[inside]),
        f"l2-norm 0.6, fastv at {middle} 0.1, out at {late}": PruningPolicy("l2-norm", keep=0.6, then=[inside, leave]),
    }


def digits(name: str, samples: int = 4) -> Built:
    """Return a shipped model, and a batch of digit scenes."""
    folder = shipped(name)
    processor: Any = AutoProcessor.from_pretrained(folder)
    generator, pool = np.random.default_rng(3), digit_pool("test")
    images = [[np.stack([draw_scene(generator, pool, 6, 6).image] * 3, -1)] for _ in range(samples)]
    text = [f"{IMAGES[name]} Question: Is there a 3? Short answer:"] * samples
    batch = processor(images=images, text=text, padding=True, return_tensors="pt")
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), dict(batch)


def wide_llava() -> Built:
    """Return a LLaVA of random weights with twelve layers, and a prompt of 576 visual tokens."""
    image, small = 999, {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 128}
    text = LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1376, num_hidden_layers=12, num_attention_heads=8
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=24 * 4, patch_size=4),
        text_config=text,
        image_token_index=image,
    )
    torch.manual_seed(0)
    ids = torch.randint(3, 900, (1, 576 + 40))
    ids[:, 4 : 4 + 576] = image
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 96, 96)}
    return LlavaForConditionalGeneration(config).eval(), batch


MODELS: dict[str, Callable[[], Built]] = {
    "digits_llava": lambda: digits("digits_llava"),
    "digits_qwen2_5_vl": lambda: digits("digits_qwen2_5_vl"),
    "wide-llava": wide_llava,
}
CLOCKS = {"wall": time.perf_counter, "thread": time.thread_time}


def compared(built: Built, seconds: float, clock: Callable[[], float]) -> list[tuple[str, float, float, float]]:
    """Return name, price, predicted and measured seconds of each schedule; the unpruned model comes first."""
    model, batch = built

    def answer(family: Any) -> Any:
        return family.model.generate(**batch, max_new_tokens=1, min_new_tokens=1, do_sample=False)

    timing, profiled = Measurement(model, answer, None, None, clock), Runs.of(PROFILED)
    held_out = schedules(timing.family.depth)
    runs = {"unpruned": Run(None), **{name: Run(policy) for name, policy in held_out.items()}}
    timing.time_all([*profiled.all, *runs.values()], seconds)
    profile = profiled.profile(timing.family)
    first = next(run.prompts for run in runs.values() if run.prompts is not None)
    longest = Prompts.of(first.text.max()[None], first.tokens.max()[None])
    found = [("unpruned", 1.0, float(profile.seconds(longest)), runs["unpruned"].inside)]
    for name, policy in held_out.items():
        found.append((name, profile.share(policy, longest), float(profile.predict(policy, longest)), runs[name].inside))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--clock", choices=CLOCKS, default="thread")
    arguments = parser.parse_args()
    for name in arguments.models:
        table = Table("schedule", "share of time", "predicted ms", "measured ms", "off by", title=name)
        for schedule, share, predicted, measured in compared(
            MODELS[name](), arguments.seconds, CLOCKS[arguments.clock]
        ):
            times = (f"{seconds * 1000:.1f}" for seconds in (predicted, measured))
            table.add_row(schedule, f"{share:.2f}", *times, f"{predicted / measured - 1:+.1%}")
        Console().print(table)
    Console().print(f"{arguments.clock} clock, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
