"""Methods at equal prices under shifts: one sweep whose test split holds all test sets, and a column for each of them.

    python -m benchmarks.shift_prices --output runs/shift-prices
    python -m benchmarks.shift_prices --models digits_llava --scorers calibrated divprune random quecc flashsloth dyvte

Every method pays the same: the mean number of visual tokens that a layer of the decoder reads, as a share of the
unpruned model's. Calibration and training see plain scenes alone. Agreement with the unpruned answers, its 95% interval
over images, and whether `calibrated` is ahead (`--reference` names another method). The files of `catp sweep` lie
beside the table, `shift_prices.md`.
"""

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from catp_lightning.calibration.report.controls import verdict
from catp_lightning.data import GRIDS, PROMPTS
from catp_lightning.data.shifts import SHIFTS, Shift
from catp_lightning.utils.files import read_bytes, write_json, write_text
from catp_lightning.utils.markdown import markdown_table

SETS: dict[str, Shift] = {"as calibrated": Shift(), **SHIFTS}
SCORERS = ["calibrated", "divprune", "fastervlm", "visionzip", "fastv", "pyramiddrop", "grid", "l2-norm", "random"]
UNIT, RESAMPLES = "tokens_per_layer", 2000


def written(folder: Path, model: str, questions: int) -> Path:
    """Write scenes to calibrate on, all test sets as one split, and a configuration; return its path."""
    Shift().write(folder / "calibration", "calibration", 512, 0, GRIDS[model])
    parts: dict[str, list[dict[str, Any]]] = {"questions": [], "annotations": []}
    for seed, (name, shift) in enumerate(SETS.items()):
        own = shift.write(folder / "sets" / name, "test", questions, seed, GRIDS[model])
        for key, joined in parts.items():
            found = json.loads(read_bytes(own / f"{key}.json"))
            joined.extend(found[key])
            write_json(folder / "test" / f"{key}.json", {**found, key: joined})
        shutil.copytree(own / "images", folder / "test" / "images", dirs_exist_ok=True)
    split = {
        name: {
            "questions": str(folder / name / "questions.json"),
            "annotations": str(folder / name / "annotations.json"),
            "images": str(folder / name / "images"),
            "image_name": "{image_id:012d}.png",
        }
        for name in ("calibration", "test")
    }
    data = {"processor": model, "prompt": PROMPTS[model], **split, "batch_size": 64}
    write_json(folder / "config.yaml", {"model": {"model": model}, "data": data})  # JSON is YAML
    return folder / "config.yaml"


Answers = dict[int, str]
"""Answers by question."""


def outcomes(folder: Path, shares: Sequence[float]) -> tuple[Answers, dict[float, dict[str, list[Answers]]]]:
    """Return the unpruned answers by question, and by price and method those of each seed or draw of the method."""
    full: Answers = {}
    found: dict[float, dict[str, list[Answers]]] = {share: {} for share in shares}
    for file in sorted(folder.rglob("priced-jobs/*.json")):
        outcome = json.loads(read_bytes(file))["outcome"]
        answers = dict(zip(outcome["question_ids"], outcome["answers"], strict=True))
        if file.stem == "unpruned":
            full = answers
            continue
        paid = min(shares, key=lambda share: abs(math.log(outcome["prices"][UNIT] / share)))
        name = re.sub(r"-(seed|draw)-\d+.*$", "", file.stem.partition("-keep-")[0])
        found[paid].setdefault(name, []).append(answers)
    return full, found


def rows(full: Answers, found: dict[str, list[Answers]], reference: str) -> list[list[str]]:
    """Return a row for each method, best first on plain scenes: agreement on each set, and the reference's verdict."""
    table = []
    for name, draws in found.items():
        cells = []
        for number in range(len(SETS)):
            ids = [question for question in full if question // 10**8 % 1000 == number]
            images = np.array([question // 100 for question in ids])
            right = _agreed(full, draws, ids)
            cell = "{:.3f} ({:.3f} to {:.3f})".format(right.mean(), *_interval(right, images))
            if name != reference and reference in found:
                cell += f" {verdict(_interval(_agreed(full, found[reference], ids) - right, images))}"
            cells.append(cell)
        table.append([name, *cells])
    return sorted(table, key=lambda row: row[1], reverse=True)


def _agreed(full: Answers, draws: Sequence[Answers], ids: Sequence[int]) -> np.ndarray:
    """Return the share of draws that answer each question as the unpruned model: float [N]."""
    return np.array([np.mean([own[question] == full[question] for own in draws]) for question in ids])


def _interval(values: np.ndarray, images: np.ndarray) -> tuple[float, float]:
    """Return the 95% bootstrap interval of the mean, over images."""
    _, image = np.unique(images, return_inverse=True)
    count = image.max() + 1
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES)[:, image]
    low, high = np.percentile((drawn * values).sum(1) / drawn.sum(1), [2.5, 97.5])
    return float(low), float(high)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["digits_blip2", "digits_llava"])
    parser.add_argument("--scorers", nargs="+", default=SCORERS)
    parser.add_argument("--reference", default="calibrated")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.25, 0.125])
    parser.add_argument("--questions", type=int, default=150, help="of each test set")
    parser.add_argument("--output", type=Path, default=Path("runs/shift-prices"))
    chosen = parser.parse_args(args)
    text = ""
    for model in chosen.models:
        folder = chosen.output.absolute() / model
        config = written(folder / "data", model, chosen.questions)
        asked = [f"--scorers={json.dumps(chosen.scorers)}", f"--budget={json.dumps({UNIT: chosen.shares})}"]
        command = [sys.executable, "-m", "catp_lightning", "sweep", f"--config={config}", *asked]
        subprocess.run([*command, f"--output={folder / 'sweep'}"], check=True)
        full, found = outcomes(folder / "sweep", chosen.shares)
        for share in chosen.shares:
            table = markdown_table(["method", *SETS], rows(full, found[share], chosen.reference))
            text += f"## {model}, {share} of the tokens that a layer reads\n\n{table}\n"
        write_text(chosen.output / "shift_prices.md", text)
    print(text)


if __name__ == "__main__":
    main()
