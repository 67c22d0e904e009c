"""The example on easy-VQA, small, as its page says to run it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from catp_lightning import PruningPolicy
from tests.support.commands import answers
from tests.support.paths import ROOT
from tests.support.processes import environment

EXAMPLE = ROOT / "examples/easy_vqa"
COLORS = {"black": "#000", "blue": "#00f", "red": "#f00", "yellow": "#ff0"}
PLACES = {"northwest", "north", "northeast", "west", "center", "east", "southwest", "south", "southeast"}
DRAW = {"circle": "ellipse", "rectangle": "rectangle"}


def write_easy_vqa(folder: Path, images: int, seed: int) -> None:
    """Images of one shape on a light background, and three questions about each, in easy-VQA's layout."""
    rng, asked = np.random.default_rng(seed), []
    (folder / "images").mkdir(parents=True)
    for number in range(images):
        color, shape = str(rng.choice(list(COLORS))), str(rng.choice(list(DRAW)))
        image = Image.new("RGB", (64, 64), tuple(int(value) for value in rng.integers(230, 256, 3)))
        left, top = (int(value) for value in rng.integers(0, 40, 2))
        getattr(ImageDraw.Draw(image), DRAW[shape])((left, top, left + 20, top + 20), fill=COLORS[color])
        image.save(folder / "images" / f"{number}.png")
        asked += [["what color is the shape?", color, number], [f"what is the {color} shape?", shape, number]]
        asked += [["is there a red shape?", "yes" if color == "red" else "no", number]]
    (folder / "questions.json").write_text(json.dumps(asked))


def run(script: str, out: Path, *options: str) -> str:
    command = [sys.executable, str(EXAMPLE / f"{script}.py"), "--out", str(out), "--threads", "1", *options]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_the_example_trains_calibrates_predicts_pruned_and_compares(tmp_path: Path) -> None:
    for seed, (split, images) in enumerate({"train": 160, "test": 40}.items()):
        write_easy_vqa(tmp_path / "easy" / split, images, seed)
    out = tmp_path / "out"
    run("train", out, "--data", str(tmp_path / "easy"), "--questions", "0.1", "--tower-steps", "3", "--steps", "3")
    asked = {split: json.loads((out / "data" / split / "questions.json").read_text()) for split in ("single", "scenes")}
    assert {split: len(questions) for split, questions in asked.items()} == {"single": 40, "scenes": 60}
    assert {text.split("? ")[1] for text, _, _ in asked["scenes"]} == PLACES

    run("calibrate", out)
    policies = {keep: PruningPolicy.load(out / "policies", keep=keep) for keep in (0.5, 0.25, 0.125, 0.0625)}
    assert all(policy.evidence for policy in policies.values())

    predicted = run("predict", out, "--keep", "0.125")
    assert re.search(r"catp/tokens_kept\W+11\.0", predicted) and "test/easyvqa_accuracy" in predicted
    assert list(answers(out / "answers.jsonl")) == list(range(60))

    run("compare", out)
    single, *nine = (out / "table.md").read_text().split("## ")[1:]
    of_nine = [(table, "60 questions about 30 images") for table in nine]
    assert len(of_nine) == 2 and nine[0] != nine[1]
    for table, questions in ((single, "40 questions about 20 images"), *of_nine):
        assert questions in table
        rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines() if line.startswith("| ")}
        assert {"calibrated", "random", "grid", "DivPrune", "VisionZip", "FastV, layer 3"} < set(rows)
        agreement = [float(value) for value in re.findall(r"\| (\d\.\d{3}) \(", rows["random"])]
        assert len(agreement) == 4 and all(0 <= value <= 1 for value in agreement)
    plain, noisy = (np.asarray(Image.open(out / "data" / split / "images/0.png")) for split in ("scenes", "noisy"))
    assert np.std(noisy.astype(float) - plain) == pytest.approx(0.1 * 255, rel=0.3)  # bright pixels are clipped
