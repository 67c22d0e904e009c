"""Measure the cost of observing the vision tower and Q-Former, against SDPA and eager with output_attentions.

    python benchmarks/observed_attention.py --shape blip2-opt-2.7b

Random weights at real shapes; times are medians of interleaved rounds, reported as ratios to SDPA in the same run.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig, OPTConfig

from catp_lightning.methods.observation import Needs, Signal
from catp_lightning.methods.scorers import SCORERS, Scorer
from catp_lightning.methods.scorers.catp import CATP
from catp_lightning.models import find_family
from catp_lightning.prompt.call import ModelCall
from catp_lightning.prompt.prompt import Prompt
from catp_lightning.pruning.observer import Observer

SHAPES = {  # vision width, layers, heads, pixels; Q-Former width, layers, heads
    "small": (256, 4, 8, 224, 256, 6, 8),
    "half": (704, 20, 8, 224, 384, 12, 6),
    "blip2-opt-2.7b": (1408, 39, 16, 224, 768, 12, 12),
}

SDPA = "SDPA"
MEAN_LOG = "observed and scored: cross-attention (mean log)"
BORDA = "observed and scored: catp (Borda vote)"


def build(shape: str) -> Blip2ForConditionalGeneration:
    width, layers, heads, pixels, q_width, q_layers, q_heads = SHAPES[shape]
    vision = Blip2VisionConfig(
        hidden_size=width,
        intermediate_size=int(width * 4.3637),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=pixels,
        patch_size=14,
        initializer_range=0.02,
    )
    qformer = Blip2QFormerConfig(
        hidden_size=q_width,
        intermediate_size=4 * q_width,
        num_hidden_layers=q_layers,
        num_attention_heads=q_heads,
        encoder_hidden_size=width,
    )
    text = OPTConfig(hidden_size=64, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=64)
    config = Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=qformer.to_dict(),
        text_config=text.to_dict(),
        image_token_index=50,
    )
    return Blip2ForConditionalGeneration(config).eval()  # the language model is not run


def vision_part(model: Blip2ForConditionalGeneration, pixels: Tensor, **settings: bool) -> None:
    image = model.vision_model(pixels, **settings).last_hidden_state
    queries = model.query_tokens.expand(len(pixels), -1, -1)
    model.qformer(query_embeds=queries, encoder_hidden_states=image, **settings)


def vision_cases(shape: str, batch: int) -> dict[str, Callable[[], None]]:
    """Return the cases to compare, plain SDPA first; each call is one forward of the vision part on the same pixels."""
    torch.manual_seed(0)
    model = build(shape)
    pixels = torch.randn(batch, 3, 224, 224)

    def sdpa() -> None:
        model.set_attn_implementation("sdpa")
        vision_part(model, pixels)

    def eager() -> None:
        model.set_attn_implementation("eager")
        vision_part(model, pixels, output_attentions=True)

    def observed(scorer: Scorer | None, needs: Needs) -> Callable[[], None]:
        def run() -> None:
            model.set_attn_implementation("sdpa")
            call: Any = SimpleNamespace(user_call=ModelCall())
            observer = Observer(find_family(model), needs, call)
            with observer.watching():
                vision_part(model, pixels)
            if scorer is not None:
                scorer.score(observer.take(Prompt(torch.empty(0, 0), call.user_call, 1)))

        return run

    everything: Needs = {
        Signal.CROSS_ATTENTION: None,
        Signal.SELF_ATTENTION: None,
        Signal.VISION_ATTENTION_RECEIVED: None,
    }
    weighted = CATP(image_weight="received")
    mean_log, received = SCORERS["cross-attention"](), SCORERS["self-attention"]()
    return {
        SDPA: sdpa,
        "eager, output_attentions": eager,
        "observed: every signal, no score": observed(None, everything),
        MEAN_LOG: observed(mean_log, mean_log.needs),
        "observed and scored: self-attention": observed(received, received.needs),
        BORDA: observed(CATP(), CATP().needs),
        "observed and scored: catp, weighted by image token": observed(weighted, weighted.needs),
    }


def interleaved(cases: Mapping[str, Callable[[], object]], rounds: int, description: str) -> dict[str, list[float]]:
    """Time each case, one after the other in every round; returns seconds without those of a first, warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in track(range(rounds + 1), description=description):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(values: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Return median, lowest and highest of the rounds' ratios of `values` to `base`."""
    each = [value / plain for value, plain in zip(values, base, strict=True)]
    return statistics.median(each), min(each), max(each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="half")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        seconds = interleaved(vision_cases(arguments.shape, arguments.batch), arguments.rounds, "rounds")
    table = Table("vision tower and Q-Former", "median s", "ratio to SDPA (median of rounds)", "lowest to highest")
    for name, values in seconds.items():
        middle, low, high = ratios(values, seconds[SDPA])
        table.add_row(name, f"{statistics.median(values):.3f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}")
    threads = torch.get_num_threads()
    Console().print(f"{arguments.shape}, batch {arguments.batch}, {arguments.rounds} rounds, {threads} threads")
    Console().print(table)


if __name__ == "__main__":
    main()
