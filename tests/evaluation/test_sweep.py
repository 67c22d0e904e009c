"""`catp sweep` on the shipped models: every figure is of a real run, and no finished job is run again."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from catp_lightning.data import shipped
from catp_lightning.data.vqa import VQADataModule, VQASplit
from catp_lightning.modules.vqa import VQAModule
from catp_lightning.policy import PruningPolicy
from catp_lightning.pruning import prune
from tests.support.paths import ROOT
from tests.support.sweeps import ARGS, JOBS, QUESTIONS, jobs, outcome, sweep, table


def test_the_table_holds_what_a_loop_over_the_questions_finds(swept: Path) -> None:
    place = swept / "digits_blip2/data/test"
    split = VQASplit.of_scenes(place)
    data, module = VQADataModule(str(shipped("digits_blip2")), test=split), VQAModule(str(shipped("digits_blip2")))
    truth = json.loads((place / "annotations.json").read_text())["annotations"]
    truth = [item["multiple_choice_answer"] for item in truth]
    pruned: dict[str, list[str]] = {}
    with torch.no_grad():
        full = [answer for batch in data.test_dataloader() for answer in module.answer(batch)]
        for scorer in ("fastv", "stride"):
            with prune(module, PruningPolicy(scorer, keep=2)):
                pruned[scorer] = [answer for batch in data.test_dataloader() for answer in module.answer(batch)]
    share = lambda one, other: sum(a == b for a, b in zip(one, other, strict=True)) / QUESTIONS  # noqa: E731
    unpruned = table(swept)["no pruning", "None"]
    assert len(full) == QUESTIONS and share(full, truth) < 1 and share(pruned["stride"], full) < 0.5, (
        "or little is shown"
    )
    assert unpruned["accuracy"] == pytest.approx(share(full, truth)) and unpruned["tokens"] == 32
    for scorer, answers in pruned.items():
        found = table(swept)[scorer, "2"]
        assert found["accuracy"] == pytest.approx(share(answers, truth))
        assert found["accuracy_share"] == pytest.approx(share(answers, truth) / share(full, truth))
        assert found["agreement"] == pytest.approx(share(answers, full))
        assert found["tokens"] == 2
        assert outcome(swept, f"{scorer}-keep-2.json")["answers"] == answers
    assert table(swept)["fastv", "2"]["tokens_per_layer"] == (32 + 32 + 2 + 2) / 4, (
        "layers 0 and 1 of 4 read everything"
    )
    assert "tokens_per_layer" not in table(swept)["stride", "2"]


def test_a_methods_seeds_are_one_row_and_differences_are_paired_with_the_reference(swept: Path) -> None:
    full = outcome(swept, "unpruned.json")["answers"]
    same = [
        np.mean([a == b for a, b in zip(outcome(swept, f"random-seed-{n}-keep-2.json")["answers"], full, strict=True)])
        for n in range(3)
    ]
    row, reference = table(swept)["random (3 seeds)", "2"], table(swept)["fastv", "2"]
    assert len(set(same)) > 1, "or the mean proves nothing"
    assert row["agreement"] == pytest.approx(np.mean(same))
    assert row["reference_ahead"] == pytest.approx(reference["agreement"] - np.mean(same))
    assert "reference_ahead" not in reference
    assert row["control"] and not reference["control"]


def test_a_method_that_makes_no_sense_is_a_note_with_its_reason(swept: Path) -> None:
    text = (swept / "digits_blip2/table.md").read_text()
    figures, notes = text.split("## Not in the table")
    assert "fastervlm" not in figures
    assert "- fastervlm: The policy reads vision-attention, which Blip2ForConditionalGeneration does not show" in notes
    assert figures.count("| stride (control) |") == 2 and figures.count("| **fastv** |") == 2
    assert len(jobs(swept)) == JOBS + 1


def test_the_best_method_of_a_budget_stands_first(swept: Path) -> None:
    text = (swept / "digits_blip2/table.md").read_text()
    for part in text.split("## keep ")[1:]:
        shown = [float(value) for value in re.findall(r"^\| [^|]+ \| (\d\.\d{3}) \(", part, re.MULTILINE)]
        assert len(shown) == 5
        assert shown[1:] == sorted(shown[1:], reverse=True)


@pytest.mark.slow
def test_the_same_command_again_runs_nothing_and_ends_in_the_same_bytes(swept: Path, capsys) -> None:
    same_again(swept, ARGS, JOBS, capsys)


@pytest.mark.usefixtures("undrawn")
def test_a_small_command_again_runs_nothing_and_ends_in_the_same_bytes(tmp_path: Path, capsys) -> None:
    args = ["--models", "digits_blip2", "--questions", 8, "--scorers", "stride", "--keep", "4"]
    same_again(sweep(tmp_path, *args), args, 1, capsys)


def same_again(folder: Path, args: list[Any], count: int, capsys) -> None:
    before = jobs(folder)
    files = {path: path.read_bytes() for path in folder.glob("digits_blip2/*.*")}
    assert len(files) == 4
    capsys.readouterr()
    sweep(folder, *args)
    assert f"{count} of {count} jobs were finished by an earlier run" in " ".join(capsys.readouterr().out.split())
    assert jobs(folder) == before
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_only_what_has_changed_is_run_again(tmp_path: Path) -> None:
    args = ["--models", "digits_blip2", "--questions", 8, "--scorers", "stride,l2-norm", "--keep"]
    before = jobs(sweep(tmp_path, *args, "4"))
    damaged, other = tmp_path / "digits_blip2/jobs/l2-norm-keep-4.json", "stride-keep-4.json"
    damaged.write_text(damaged.read_text()[:-40])
    after = jobs(sweep(tmp_path, *args, "[4, 0.5]"))
    assert after.keys() - before.keys() == {"l2-norm-keep-0.5.json", "stride-keep-0.5.json"}
    assert {name for name in before if after[name] != before[name]} == {damaged.name}
    scenes = jobs(sweep(tmp_path, *args, "4", "--seed", "1"))
    settings = jobs(sweep(tmp_path, *args, "4", "--seed", "1", "--model.generation", '{"max_new_tokens": 2}'))
    for name in (damaged.name, other, "unpruned.json"):
        assert after[name] < scenes[name] < settings[name]


def without_seconds(rows: dict[tuple[str, str], dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    assert all(row.pop("seconds") > 0 for row in rows.values())
    return rows


@pytest.mark.slow
def test_a_killed_sweep_ends_in_the_same_table_and_repeats_no_finished_job(swept: Path, tmp_path: Path) -> None:
    counts = ["--questions", str(QUESTIONS), "--calibration_questions", "8", "--output", str(tmp_path)]
    code = "from catp_lightning.cli.main import main; main()"
    command = [sys.executable, "-c", code, "sweep", *ARGS, *counts, "--trainer.accelerator", "cpu"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 900  # of a machine with other work
    while len(jobs(tmp_path)) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it must be killed before it ends"
    finished = jobs(tmp_path)
    assert 4 <= len(finished) < JOBS + 1
    assert not (tmp_path / "digits_blip2/table.md").exists()
    sweep(tmp_path, *ARGS)
    assert finished.items() <= jobs(tmp_path).items()
    for name in ("table.md", "accuracy.png"):
        assert (tmp_path / "digits_blip2" / name).read_bytes() == (swept / "digits_blip2" / name).read_bytes()
    assert without_seconds(table(tmp_path)) == without_seconds(table(swept))


@pytest.mark.slow
def test_several_models_make_one_table_and_one_plot_more(tmp_path: Path) -> None:
    args = ["--scorers", "trimmed-llama,sgl,downsample,stride", "--keep", "0.25", "--reference", "stride"]
    sweep(tmp_path, "--models", "[digits_llava, digits_mllama]", *args, "--questions", 12)
    found = {model: table(tmp_path, model) for model in ("digits_llava", "digits_mllama")}
    assert found["digits_llava"].keys() == {
        ("no pruning", "None"),
        *((name, "0.25") for name in ("sgl (guided by the model itself)", "downsample", "stride")),
    }
    methods = ("trimmed-llama", "trimmed-llama at equal rows", "stride")
    assert found["digits_mllama"].keys() == {("no pruning", "None"), *((name, "0.25") for name in methods)}
    assert found["digits_llava"]["stride", "0.25"]["tokens"] == 36
    assert (
        found["digits_mllama"]["trimmed-llama", "0.25"]["tokens"]
        > found["digits_mllama"]["stride", "0.25"]["tokens"]
        == found["digits_mllama"]["trimmed-llama at equal rows", "0.25"]["tokens"]
    )
    lines = (tmp_path / "table.md").read_text().splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines if line[:1] == "|"}
    assert cells["method"] == ["digits_llava, keep 0.25", "digits_mllama, keep 0.25"]
    shares = [100 * found[model]["stride", "0.25"]["accuracy_share"] for model in found]
    assert [float(cell) for cell in cells["stride (control)"]] == pytest.approx(shares, abs=0.051)
    assert cells["trimmed-llama"][0] == "-" and cells["sgl (guided by the model itself)"][1] == "-"
    assert Image.open(tmp_path / "accuracy.png").width > 1.5 * Image.open(tmp_path / "digits_llava/accuracy.png").width
