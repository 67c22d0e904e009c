"""A project that knows nothing of ours gets one line, literally, and loses it again."""

import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from catp_lightning import CrossAttentionCalibration, PruningPolicy, TokenPruning, prune
from tests.support.footprints import footprint
from tests.support.modules import same
from tests.support.paths import ROOT
from tests.support.policies import HALF

pytestmark = pytest.mark.usefixtures("undrawn")
PROJECT = ROOT / "tests/existing_project"
PRUNED = '            TokenPruning("policy.json"),\n'
CALIBRATED = '            CrossAttentionCalibration("measured.json", keep=0.25, scorer="stride"),\n'


@contextmanager
def standing_in(folder: Path, source: Path) -> Iterator[Path]:
    """A copy, in which one stands as its user does; what of it was imported is forgotten afterwards."""
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setattr(sys, "argv", ["reading"])
        HALF.save("policy.json")
        yield folder
        forget()


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    with standing_in(tmp_path, PROJECT) as folder:
        yield folder


@pytest.fixture(scope="module")
def after_training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project, trained in runs/ and evaluated in plain/."""
    with standing_in(tmp_path_factory.mktemp("trained"), PROJECT) as folder:
        trained()
        evaluated("plain")
    return folder


@pytest.fixture
def trained_project(tmp_path: Path, after_training: Path) -> Iterator[Path]:
    with standing_in(tmp_path, after_training) as folder:
        yield folder


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "reading"]:
        del sys.modules[name]


def run(script: str, *arguments: str) -> None:
    """python -m reading.<script>, in this process, which has imported the libraries already."""
    forget()
    importlib.invalidate_caches()
    before, sys.argv = sys.argv, [script, *arguments]
    try:
        runpy.run_module(f"reading.{script}", run_name="__main__")
    finally:
        sys.argv = before


def trained(out: str = "runs") -> dict[str, Any]:
    run("train", "--out", out)
    return torch.load(Path(out) / "last.ckpt", weights_only=True)["state_dict"]


def evaluated(out: str) -> tuple[list[torch.Tensor], list[torch.Tensor], dict[str, Any]]:
    """What the project's own callbacks and logger caught: logits of its test, words it said, what was logged."""
    run("evaluate", "--out", out, "--ckpt", "runs/last.ckpt")
    return written(out)


def written(out: str) -> tuple[list[torch.Tensor], list[torch.Tensor], dict[str, Any]]:
    words = torch.load(Path(out) / "words.pt", weights_only=True)["predictions"]
    return torch.load(Path(out) / "logits.pt"), [batch["words"] for batch in words], logged(out, "evaluate")


def logged(out: str, name: str) -> dict[str, Any]:
    lines = [json.loads(line) for line in (Path(out) / f"{name}.jsonl").read_text().splitlines()]
    return {key: value for line in lines for key, value in line.items()}


def insert(script: str, line: str, after: str) -> str:
    """One line into a script's list of callbacks, and its import; returns the script as it was."""
    file = Path("reading") / f"{script}.py"
    text = file.read_text()
    assert text.count(after) == 1
    name = line.strip().partition("(")[0]
    changed = text.replace(after, after + line).replace(
        "import argparse\n", f"import argparse\nfrom catp_lightning import {name}\n"
    )
    assert len(changed.splitlines()) == len(text.splitlines()) + 2
    file.write_text(changed)
    return text


def by_hand() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The project's own pieces, in a loop of ours, under prune."""
    module = importlib.import_module("reading.module").ReadingModule()
    module.load_state_dict(torch.load("runs/last.ckpt", weights_only=True)["state_dict"])
    data = importlib.import_module("reading.data").ReadingData()
    data.setup("test")
    before = footprint(module)
    with torch.no_grad(), prune(module.eval(), HALF):
        batches = list(data.test_dataloader())
        logits = [module(batch) for batch in batches]
        words = [module.net.say(batch["pixels"], batch["words"], batch["mask"]) for batch in batches]
    assert footprint(module) == before
    return logits, words


def test_one_line_prunes_its_evaluation_and_without_the_line_all_is_as_before(trained_project: Path) -> None:
    logits, words, figures = written("plain")
    assert not [key for key in figures if key.startswith("catp")]

    script = insert("evaluate", PRUNED, after="            logits,\n")
    pruned_logits, pruned_words, pruned_figures = evaluated("pruned")
    expected_logits, expected_words = by_hand()
    assert same(pruned_logits, expected_logits)
    assert same(pruned_words, expected_words)
    assert not same(pruned_logits, logits)
    assert not same(pruned_words, words)
    assert pruned_figures["catp/tokens_kept"] == 4
    assert pruned_figures["catp/keep_share"] == 0.5
    assert pruned_figures.keys() - figures.keys() == {"catp/tokens_kept", "catp/keep_share"}
    assert figures["test/rank"] != pruned_figures["test/rank"]

    Path("reading/evaluate.py").write_text(script)
    again = evaluated("again")
    assert same(again[0], logits)
    assert same(again[1], words)
    assert again[2] == figures


def test_one_line_prunes_the_validation_of_its_training_and_nothing_of_the_training(trained_project: Path) -> None:
    weights = torch.load("runs/last.ckpt", weights_only=True)["state_dict"]
    figures = logged("runs", "train")
    insert("train", PRUNED.replace("    ", "", 1), after="        LearningRateMonitor(),\n")
    pruned_weights, pruned_figures = trained("pruned"), logged("pruned", "train")
    assert all(torch.equal(value, pruned_weights[key]) for key, value in weights.items())
    assert weights.keys() == pruned_weights.keys()
    assert pruned_figures["train/loss"] == figures["train/loss"]
    assert pruned_figures["val/loss"] != figures["val/loss"]
    assert pruned_figures["catp/tokens_kept"] == 4


@pytest.mark.slow
def test_one_line_calibrates_on_its_own_data_and_its_predictions_stay_the_usual_ones(trained_project: Path) -> None:
    logits, words, figures = written("plain")
    insert("evaluate", CALIBRATED, after="            logits,\n")
    measured = evaluated("measured")
    assert same(measured[0], logits)
    assert same(measured[1], words)
    assert {key: measured[2][key] for key in figures} == figures
    assert "catp/keep-0.25/agreement" in measured[2]
    policy = PruningPolicy.load("measured.json")
    assert policy.keep == 0.25
    assert sum(policy.evidence["samples"].values()) == 24
    assert (Path("measured-report") / "report.md").is_file()


# ---- the same from YAML


CONFIG = """
trainer:
  callbacks+:
    - class_path: catp_lightning.TokenPruning
      init_args:
        policy: policy.json
        keep: 0.5
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "pruned.yaml"],
        ["--trainer.callbacks+=TokenPruning", "--trainer.callbacks.policy=policy.json"],
    ],
    ids=["YAML", "name"],
)
def test_a_command_line_of_its_own_takes_token_pruning(project: Path, arguments: list[str]) -> None:
    Path("pruned.yaml").write_text(CONFIG)
    forget()
    command = importlib.import_module("reading.cli").main(["test", "--config", "config.yaml", *arguments])
    names = [type(callback).__name__ for callback in command.trainer.callbacks]
    assert names.count("TokenPruning") == names.count("ModelSummary") == 1
    pruning = next(callback for callback in command.trainer.callbacks if isinstance(callback, TokenPruning))
    assert pruning.figures == {"catp/tokens_kept": 4, "catp/keep_share": 0.5}
    assert command.trainer.callback_metrics["catp/tokens_kept"] == 4


@pytest.mark.slow
def test_a_command_line_of_its_own_takes_calibration(project: Path) -> None:
    forget()
    command = importlib.import_module("reading.cli").main(
        [
            "predict", "--config", "config.yaml", "--trainer.callbacks+=CrossAttentionCalibration",
            "--trainer.callbacks.path=measured.json", "--trainer.callbacks.keep=3",
            "--trainer.callbacks.scorer=stride", "--trainer.callbacks.settings.probes=2",
        ]
    )  # fmt: skip
    assert any(isinstance(callback, CrossAttentionCalibration) for callback in command.trainer.callbacks)
    policy = PruningPolicy.load("measured.json")
    assert (policy.keep, policy.scorer) == (3, "stride")


@pytest.mark.slow
def test_the_line_works_in_a_process_that_never_heard_of_these_tests(project: Path) -> None:
    insert("evaluate", PRUNED, after="            logits,\n")
    root = str(ROOT)
    environment = {**os.environ, "PYTHONPATH": root}
    for script, options in (("train", []), ("evaluate", ["--ckpt", "runs/last.ckpt"])):
        command = [sys.executable, "-m", f"reading.{script}", "--out", "runs", *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr
    logits, words = by_hand()
    assert same(torch.load("runs/logits.pt"), logits)
    said = torch.load("runs/words.pt", weights_only=True)["predictions"]
    assert same([batch["words"] for batch in said], words)


def test_nothing_in_the_project_knows_of_ours() -> None:
    sources = [file.read_text() for file in PROJECT.rglob("*.py")]
    assert len(sources) >= 8
    assert not [text for text in sources if "catp" in text or "tests" in text.replace("its tests", "")]
