"""Check that promises are kept: calibrations are redrawn from real answers, with several questions an image.

    python -m benchmarks.promise --output runs/promise

Each shipped model answers four kinds of question about 1,000 images, unpruned and pruned at the budgets that a promise
walks down by policies calibrated on other images. The four kinds disagree unequally. From these answers check parts are
drawn anew, 2,000 times for each promise and number of images, with the package's own draw of a question and its own
walk; a promise is broken where the budget it ends at disagrees on more of all questions than was promised. That may
happen in 5% of calibrations. For comparison each image is also asked the question whose text has the smallest checksum,
which asks some kinds far more often than others. An interrupted run goes on.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from rich.console import Console
from scipy.stats import binom

from benchmarks.answers import QUIET, predict
from catp_lightning import CrossAttentionCalibration, PruningPolicy, VQAModule
from catp_lightning.calibration.asked import Asked
from catp_lightning.calibration.search.promise import GRID, Promise, fixed_sequence_test
from catp_lightning.data import GRIDS, PROMPTS, SHIPPED, shipped
from catp_lightning.data.scenes import KINDS, Split, write_scenes
from catp_lightning.data.vqa import VQADataModule
from catp_lightning.data.vqa_dataset import VQASplit
from catp_lightning.policy.locations import budget_file_name
from catp_lightning.utils.files import write_json, write_text
from catp_lightning.utils.hashing import mix
from catp_lightning.utils.markdown import markdown_table
from catp_lightning.utils.messages import quiet

IMAGES, CALIBRATION_QUESTIONS, BATCH = 1000, 512, 64
PROMISES, CHECKED, REDRAWS, CONFIDENCE = (0.05, 0.09, 0.12), (150, 200, 400, 800), 2000, 0.95


@dataclass(frozen=True)
class Answered:
    """Agreement of a model's pruned answers, to Q questions about each of I images, at K budgets from the largest.

    Attributes:
        same: bool [I, Q, K], True where the pruned answer is the unpruned one.
        texts: int64 [I, Q], a checksum of each question's text.
    """

    same: np.ndarray
    texts: np.ndarray

    @property
    def disagreement(self) -> np.ndarray:
        """Probability of another answer than the unpruned one to a random question about a new image: float [K]."""
        return 1 - self.same.mean((0, 1))


def drawn(answered: Answered, images: int, rng: np.random.Generator, by_text: bool = False) -> list[int]:
    """Return the number of `images` new images that disagree at each budget, one question each.

    Args:
        answered: images are drawn from it with replacement, each with a checksum of its own.
        images: number of new images.
        rng: random generator of the draw.
        by_text: ask each image the question whose text has the smallest checksum, not one drawn at random.
    """
    chosen = rng.integers(0, len(answered.same), images)
    fingerprints = torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, images)).repeat_interleave(len(KINDS))
    texts = torch.from_numpy(answered.texts[chosen].reshape(-1))
    agreed = torch.from_numpy(answered.same[chosen].reshape(len(texts), -1).T)
    metric = Asked(len(agreed))
    draws = texts if by_text else mix(fingerprints ^ texts)
    metric.update(fingerprints, torch.zeros_like(fingerprints), draws, agreed)
    return [int(count) for count in metric.compute().drawn.sum(0)]


def broken(
    answered: Answered, promise: Promise, images: int, redraws: int, seed: int = 0, by_text: bool = False
) -> int:
    """Return the number of `redraws` calibrations whose chosen budget disagrees on more than was promised."""
    rng, truth, count = np.random.default_rng(seed), answered.disagreement, 0
    for _ in range(redraws):
        chosen = fixed_sequence_test(promise, drawn(answered, images, rng, by_text), images).chosen
        count += chosen is not None and bool(truth[chosen] > promise.max_disagreement)
    return count


def limit(redraws: int, confidence: float = CONFIDENCE) -> int:
    """Return the most broken promises of `redraws` that chance explains, with 99.9%, if each is kept with `confidence`.

    >>> limit(2000), limit(20)
    (131, 5)
    """
    return int(binom.ppf(0.999, redraws, 1 - confidence))


def split_of(model: str, folder: Path, split: Split, images: int, seed: int) -> VQASplit:
    """Write scenes with all four kinds of question about each image, and return them as a split."""
    place = write_scenes(folder, split, images * len(KINDS), seed, len(KINDS), GRIDS[model])
    return VQASplit.of_scenes(place)


def answered_by(
    module: VQAModule, model: str, split: VQASplit, policies: Sequence[PruningPolicy], console: Console
) -> Answered:
    """Predict for real, unpruned and by each policy, and return the agreement."""
    data = VQADataModule(str(shipped(model)), test=split, batch_size=BATCH, prompt=PROMPTS[model])
    batches = list(data.test_dataloader())
    full = predict(module, batches, None)
    same = []
    for policy in policies:
        answers = predict(module, batches, policy)
        same.append(np.equal(answers, full))
        console.print(f"{model}, keep {policy.keep}: {1 - same[-1].mean():.3f} of the answers change", highlight=False)
    asked = [record["question"] for record in json.loads(Path(split.questions).read_text())["questions"]]
    texts = np.array([_checksum(text) for text in asked])
    return Answered(np.stack(same, 1).reshape(-1, len(KINDS), len(policies)), texts.reshape(-1, len(KINDS)))


def _checksum(text: str) -> int:
    letters = torch.tensor([ord(letter) for letter in text], dtype=torch.int64)
    return int(mix(mix(letters + mix(torch.arange(len(letters), dtype=torch.int64))).sum()[None])[0])


def calibrated(module: VQAModule, model: str, folder: Path) -> list[PruningPolicy]:
    """Return policies at the budgets of a promise, from images of their own; those of an earlier run are reused."""
    files = [folder / "policies" / budget_file_name(keep) for keep in GRID]
    if not all(file.is_file() for file in files):
        split = split_of(model, folder / "calibration", "calibration", CALIBRATION_QUESTIONS // len(KINDS), 0)
        data = VQADataModule(str(shipped(model)), calibration=split, batch_size=BATCH, prompt=PROMPTS[model])
        callback = CrossAttentionCalibration(folder / "policies", keep=list(GRID))
        trainer = Trainer(**QUIET, callbacks=[callback])
        trainer.predict(module, data.calibration_dataloader(), return_predictions=False)
    return [PruningPolicy.load(file) for file in files]


def of_model(model: str, folder: Path, console: Console) -> Answered:
    """Return the agreement of a model, predicted now or saved by an earlier run."""
    file = folder / "answers.json"
    if not file.is_file():
        module = VQAModule(str(shipped(model)))
        policies = calibrated(module, model, folder)
        found = answered_by(module, model, split_of(model, folder / "test", "test", IMAGES, 0), policies, console)
        write_json(file, {"same": found.same.astype(int).tolist(), "texts": found.texts.tolist()})
    saved = json.loads(file.read_text())
    return Answered(np.array(saved["same"], dtype=bool), np.array(saved["texts"]))


def table(model: str, answered: Answered) -> tuple[str, list[dict[str, Any]]]:
    """Return the disagreement of each kind of question and the number of broken promises, as Markdown and as rows."""
    by_kind = [[kind, *(f"{1 - value:.3f}" for value in answered.same[:, n].mean(0))] for n, kind in enumerate(KINDS)]
    by_kind.append(["a random question", *(f"{value:.3f}" for value in answered.disagreement)])
    rows = []
    for most in PROMISES:
        for images in CHECKED:
            promise = Promise(most, CONFIDENCE)
            counts = [broken(answered, promise, images, REDRAWS, by_text=by_text) for by_text in (False, True)]
            rows.append({"promise": most, "images": images, "broken": counts[0], "by text": counts[1]})
    shown = [
        [f"{row['promise']:.0%}", row["images"], f"{row['broken'] / REDRAWS:.2%}", f"{row['by text'] / REDRAWS:.2%}"]
        for row in rows
    ]
    head = ["promise", "check images", "broken, question drawn at random", "broken, question of the smallest text"]
    text = (
        f"## {model}\n\nDisagreement by kind of question and budget:\n\n"
        + markdown_table(["kind", *(f"{keep:g}" for keep in GRID)], by_kind)
        + f"\nBroken promises in {REDRAWS:,} calibrations; chance explains up to {limit(REDRAWS) / REDRAWS:.2%}:\n\n"
        + markdown_table(head, shown)
    )
    return text, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/promise"))
    parser.add_argument("--models", nargs="+", choices=SHIPPED, default=SHIPPED)
    arguments = parser.parse_args()
    console, texts, found = Console(), [], {}
    with quiet():
        for model in arguments.models:
            answered = of_model(model, arguments.output / model, console)
            text, found[model] = table(model, answered)
            texts.append(text)
            console.print(text, highlight=False)
    write_text(arguments.output / "promise.md", "\n".join(texts))
    write_json(arguments.output / "promise.json", found, indent=2)


if __name__ == "__main__":
    main()
