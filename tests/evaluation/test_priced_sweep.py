"""`catp sweep --budget`: every method pays the price, what it paid is what its layers read, and nothing runs twice."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from catp_lightning.cli.main import main
from catp_lightning.data import PROMPTS, shipped
from catp_lightning.data.vqa import VQADataModule, VQASplit
from catp_lightning.models import find_family
from catp_lightning.modules.vqa import VQAModule
from catp_lightning.policy import PruningPolicy
from catp_lightning.pricing import Prices, Prompts
from catp_lightning.pruning import prune
from tests.support.sweeps import sweep

MODEL = "digits_qwen2_5_vl"  # its images differ in size
METHODS = "fastv,pyramiddrop,visual-exit,stride"
pytestmark = pytest.mark.slow
BUDGET = {"tokens_per_layer": [0.5, 0.125], "prefill_flops": [0.5]}
ARGS = ["--models", MODEL, "--scorers", METHODS, "--budget", json.dumps(BUDGET), "--calibration_draws", "1"]
ARGS += ["--questions", "16", "--calibration_questions", "16"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweep(tmp_path_factory.mktemp("priced"), *ARGS)


def rows(output: Path) -> dict[tuple[str, str, float], dict[str, Any]]:
    found = json.loads((output / MODEL / "prices.json").read_text())["rows"]
    return {(row["method"], *next(iter(row["budget"].items()))): row for row in found if "budget" in row}


def saved(output: Path) -> dict[str, dict[str, Any]]:
    return {path.name: json.loads(path.read_text()) for path in (output / MODEL / "priced-jobs").rglob("*.json")}


def test_every_method_pays_the_price_and_hardly_less(swept: Path) -> None:
    for (method, unit, share), row in rows(swept).items():
        assert row["prices"][unit] <= share + 1e-9
        if method != "visual-exit":
            assert row["prices"][unit] > 0.95 * share, "one more token would be too much"


def test_what_was_paid_is_what_the_layers_read(swept: Path) -> None:
    folder, module = shipped(MODEL), VQAModule(str(shipped(MODEL)))
    split = VQASplit.of_scenes(swept / MODEL / "data/test")
    data = VQADataModule(str(folder), prompt=PROMPTS[MODEL], test=split, batch_size=1)
    prices = Prices.of(find_family(module))
    name, job = next((name, job) for name, job in saved(swept).items() if name.startswith("pyramiddrop"))
    policy, paid, full = PruningPolicy.from_dict(job["settings"]["policy"]), [], []
    with torch.no_grad(), prune(module, policy) as pruning:
        for batch in data.test_dataloader():
            module.answer(batch)
            assert pruning.last is not None and pruning.last.per_layer[0, 0] > pruning.last.per_layer[0, -1]
            text = batch["inputs"]["attention_mask"].sum(1) - pruning.last.counts
            prompts = Prompts.of(text, pruning.last.counts)
            paid.append(prices.price("prefill_flops", prompts, pruning.last.per_layer).item())
            full.append(prices.price("prefill_flops", prompts).item())
    assert job["outcome"]["prices"]["prefill_flops"] == pytest.approx(sum(paid) / sum(full)), name
    assert len(set(full)) > 1, "prompts differ in size"


def test_a_method_that_cannot_pay_a_price_is_a_note_with_what_it_pays(swept: Path) -> None:
    found = rows(swept)
    assert ("fastv", "tokens_per_layer", 0.5) in found and ("fastv", "tokens_per_layer", 0.125) not in found
    notes = json.loads((swept / MODEL / "prices.json").read_text())["notes"]
    why = notes["fastv at 0.125 of tokens_per_layer"]
    assert why.startswith("with one token it pays 0.17") and why.endswith("of tokens_per_layer already.")
    assert "fastv at 0.125 of tokens_per_layer" in (swept / MODEL / "prices.md").read_text()


def test_visual_tokens_exit_at_the_last_layer_that_the_price_allows(swept: Path) -> None:
    found = rows(swept)
    assert found["visual-exit", "tokens_per_layer", 0.5]["schedules"] == ["none at layer 6"]
    assert found["visual-exit", "tokens_per_layer", 0.125]["schedules"] == ["none at layer 1"]


def test_the_best_layer_is_chosen_on_the_calibration_questions(swept: Path) -> None:
    calibration = swept / MODEL / "priced-jobs/calibration-1"
    full = json.loads((calibration / "unpruned.json").read_text())["outcome"]["answers"]
    agreement: dict[tuple[int, float], float] = {}
    for path in calibration.glob("fastv-*.json"):
        job = json.loads(path.read_text())
        stage = job["settings"]["policy"]["stages"][0]
        key = stage["scorer_args"]["layer"], stage["keep"]["share"]
        agreement[key] = float(np.mean([a == b for a, b in zip(job["outcome"]["answers"], full, strict=True)]))
    row = rows(swept)["fastv at its best layer", "tokens_per_layer", 0.5]
    (text,) = row["schedules"]
    keep, layer = float(text.split()[0]), int(text.split()[-1])
    at_price = {key: value for key, value in agreement.items() if key[1] == pytest.approx(keep_of(key[0]), abs=0.03)}
    assert {layer for layer, _ in at_price} == {1, 2, 3, 4, 5}
    assert len(set(at_price.values())) > 1, "or any layer is best"
    best = max(at_price.values())
    assert [value for key, value in at_price.items() if key[0] == layer] == [best]
    assert keep == pytest.approx(keep_of(layer), abs=0.03)


def keep_of(layer: int) -> float:
    """Share with which FastV at a layer of 12 has layers read half of the tokens."""
    return (6 - layer) / (12 - layer)


def test_the_same_command_again_runs_nothing_and_ends_in_the_same_bytes(swept: Path) -> None:
    jobs = {path: path.stat().st_mtime_ns for path in (swept / MODEL / "priced-jobs").rglob("*.json")}
    files = {path: path.read_bytes() for path in swept.glob(f"{MODEL}/prices.*")}
    assert len(files) == 4
    sweep(swept, *ARGS)
    assert {path: path.stat().st_mtime_ns for path in jobs} == jobs
    assert {path: path.read_bytes() for path in files} == files


def test_tables_name_the_verdict_and_all_kinds_of_prices(swept: Path) -> None:
    text = (swept / MODEL / "prices.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")][:3] == [
        "## 0.5 of tokens_per_layer",
        "## 0.125 of tokens_per_layer",
        "## 0.5 of prefill_flops",
    ]
    assert text.count("| tokens % | per layer % | FLOPs % | cache % | reference (95%) |") == 3
    for row in rows(swept).values():
        if "reference_ahead_interval" in row:
            low, high = row["reference_ahead_interval"]
            said = "ahead" if low > 0 else "behind" if high < 0 else "level"
            assert f"({low:+.3f} to {high:+.3f}) {said} |" in text


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--budget", '{"tokens": 0.5}', "--keep", "0.5"], "give one of them"),
        (["--budget", '{"prefill_time": 0.5}'], "measured on a device"),
        (["--budget", '{"flops": 0.5}'], "budget is in 'flops'"),
        (["--budget", '{"tokens": [0.5, 0.5]}'], "several different ones"),
        (["--budget", '{"tokens": 2.0}'], "at most 1"),
        (["--keep", "0.5", "--scorers", "calibrated entry"], "There is no scorer 'calibrated entry'"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused_before_the_work(args: list[str], said: str, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["sweep", "--models", "digits_blip2", "--output", str(tmp_path), *args])
    assert said in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.rglob("*.json"))


def test_a_model_whose_prompts_have_no_known_price_is_refused(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        args = ["--models", "digits_mllama", "--budget", '{"tokens": 0.5}', "--scorers", "stride", "--questions", 2]
        sweep(tmp_path, *args, "--calibration_draws", 1)
    assert "reads the image by cross-attention" in " ".join(capsys.readouterr().err.split())
