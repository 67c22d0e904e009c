"""Measure how many answers two visual tokens can keep at most, when the pair is chosen without the question.

    python -m benchmarks.clairvoyant

For each test image all questions are asked and all pairs of visual tokens tried; the pair that keeps most answers,
weighted as the questions are drawn, is what a policy that sees the image alone could choose at best.
"""

import argparse
from itertools import combinations

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from transformers import AutoProcessor

from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.recorder import Recorder
from catp_lightning.data import shipped
from catp_lightning.data.scenes import EMPTY, GRID, digit_pool, draw_scene
from catp_lightning.methods.observation import Signal
from catp_lightning.models import find_family
from catp_lightning.modules.vqa import VQAModule

GENERAL = ["How many digits are there?", "What is the largest digit?", "What is the smallest digit?"]
QUESTIONS = [
    *GENERAL,
    *(f"Is there a {digit}?" for digit in range(10)),
    *(f"Which digit is in row {row + 1} column {column + 1}?" for row in range(GRID) for column in range(GRID)),
]


def weights(grid: np.ndarray) -> np.ndarray:
    """Return the probability of each question: kinds in turn, cells with a digit 4/5 of the time, about as `scenes`."""
    full = grid.flatten() != EMPTY
    cells = 0.8 * full / full.sum() + 0.2 / full.size
    return np.array([1 / 4, 1 / 8, 1 / 8, *[1 / 40] * 10, *(cells / 4)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=40)
    images = parser.parse_args().images
    folder = str(shipped("digits_blip2"))
    module, processor = VQAModule(folder).eval(), AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    recorder, tokens = (
        Recorder(Plan.of(find_family(module)), {Signal.IMAGE_HASH: None}),
        module.model.config.num_query_tokens,
    )
    pairs = torch.tensor(list(combinations(range(tokens), 2)))
    keep = torch.zeros(len(pairs), tokens, dtype=torch.bool).scatter_(1, pairs, True)
    rng, pool, best, mean = np.random.default_rng(5), digit_pool("test"), [], []
    text = [f"Question: {question} Short answer:" for question in QUESTIONS]
    for _ in track(range(images), "images"):
        scene = draw_scene(rng, pool)
        picture = Image.fromarray(scene.image).convert("RGB")
        inputs = processor(images=[[picture]] * len(text), text=text, padding=True, return_tensors="pt")
        with torch.no_grad(), recorder.recording():
            module.model.generate(**inputs)
            with recorder.recorded() as [(replay, *_)]:
                _, same = replay.compare(keep[:, None].expand(-1, len(text), -1))
        kept = same.double().numpy() @ weights(scene.grid)
        best.append(kept.max())
        mean.append(kept.mean())
    found = f"the best pair of each keeps {np.mean(best):.3f} of its answers, the mean pair {np.mean(mean):.3f}"
    print(f"{images} images: {found}")


if __name__ == "__main__":
    main()
