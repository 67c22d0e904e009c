"""`catp sweep` on the shipped models: every figure is of a real run, and no finished job is run again."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, Trainer
from PIL import Image

from catp_lightning.callbacks import TokenPruning
from catp_lightning.cli.main import main
from catp_lightning.cli.sweep import budgets, listed
from catp_lightning.data import GRIDS, PROMPTS, SHIPPED, shipped
from catp_lightning.data.scenes import CELL, write_scenes
from catp_lightning.data.vqa import VQADataModule, VQASplit
from catp_lightning.errors import DataError, PolicyError
from catp_lightning.evaluation.comparison import Comparison, Result
from catp_lightning.evaluation.comparison import figure as plain
from catp_lightning.evaluation.sweep.figure import figure
from catp_lightning.evaluation.sweep.flow import Reading, _calibration_draws
from catp_lightning.evaluation.sweep.methods import named, rules
from catp_lightning.evaluation.sweep.table import ModelTable
from catp_lightning.models import find_family
from catp_lightning.modules.vqa import VQAModule
from catp_lightning.policy import PruningPolicy
from catp_lightning.pruning import prune
from tests.support.paths import ROOT

QUESTIONS = 24
METHODS = ["fastv", "fastervlm", "self-attention", "random", "stride"]
ARGS = ["--models", "digits_blip2", "--scorers", ",".join(METHODS), "--keep", "0.5,2", "--seed", "1"]
JOBS = (1 + 1 + 3 + 1) * 2  # fastervlm makes no sense there, random has three seeds


def sweep(output: Path, *args: object) -> Path:
    counts = ["--questions", QUESTIONS, "--calibration_questions", 8, "--output", output]
    main(["sweep", *map(str, [*counts, "--trainer.accelerator", "cpu", *args])])
    return output


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweep(tmp_path_factory.mktemp("swept"), *ARGS)


def jobs(output: Path, model: str = "digits_blip2") -> dict[str, int]:
    """When each job's file was written."""
    return {path.name: path.stat().st_mtime_ns for path in (output / model / "jobs").glob("*.json")}


def table(output: Path, model: str = "digits_blip2") -> dict[tuple[str, str], dict[str, Any]]:
    rows = json.loads((output / model / "table.json").read_text())["rows"]
    return {(row["method"], repr(row["keep"])): row for row in rows}


def outcome(output: Path, name: str) -> dict[str, Any]:
    return json.loads((output / "digits_blip2/jobs" / name).read_text())["outcome"]


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


def test_the_same_command_again_runs_nothing_and_ends_in_the_same_bytes(swept: Path, capsys) -> None:
    before = jobs(swept)
    files = {path: path.read_bytes() for path in swept.glob("digits_blip2/*.*")}
    assert len(files) == 3
    capsys.readouterr()
    sweep(swept, *ARGS)
    assert f"{JOBS} of {JOBS} jobs were finished by an earlier run" in " ".join(capsys.readouterr().out.split())
    assert jobs(swept) == before
    assert {path: path.read_bytes() for path in files} == files


def test_only_what_has_changed_is_run_again(tmp_path: Path) -> None:
    args = ["--models", "digits_blip2", "--scorers", "stride,l2-norm", "--keep"]
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
    for name in ("table.md", "table.json", "accuracy.png"):
        assert (tmp_path / "digits_blip2" / name).read_bytes() == (swept / "digits_blip2" / name).read_bytes()


def test_several_models_make_one_table_and_one_plot_more(tmp_path: Path) -> None:
    args = ["--scorers", "trimmed-llama,sgl,downsample,stride", "--keep", "0.25", "--reference", "stride"]
    sweep(tmp_path, "--models", "[digits_llava, digits_mllama]", *args, "--data.batch_size", 12)
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


def test_a_calibration_split_is_divided_into_parts_that_share_nothing() -> None:
    data = list(range(50))
    loader = torch.utils.data.DataLoader(data, batch_size=8, collate_fn=tuple)  # type: ignore[arg-type]
    reading = Reading(None, None, lambda: loader, None, torch.device("cpu"), {})  # type: ignore[arg-type]
    assert _calibration_draws(reading, 1) == [loader]
    parts = [[sample for batch in part for sample in batch] for part in _calibration_draws(reading, 3)]
    assert sorted(sample for part in parts for sample in part) == data and [len(part) for part in parts] == [16, 17, 17]
    assert _calibration_draws(replace(reading, calibration=None), 3) == []
    with pytest.raises(PolicyError, match=r"calibration_draws is 51, but .* cannot be divided"):
        _calibration_draws(reading, 51)


@pytest.mark.slow
def test_several_calibrations_are_one_row_with_their_spread(tmp_path: Path) -> None:
    args = ["--models", "digits_blip2", "--scorers", "calibrated stride", "--keep", "0.125", "--calibration_draws", "3"]
    sweep(tmp_path, *args, "--questions", "40", "--calibration_questions", "32")
    row = table(tmp_path)["calibrated stride", "0.125"]
    assert len(row["agreement_draws"]) == 3 and row["agreement"] == pytest.approx(np.mean(row["agreement_draws"]))
    images = [
        PruningPolicy.load(tmp_path / "digits_blip2/policies" / name).evidence["images"]
        for name in ("calibrated-stride", "calibrated-stride-draw-2", "calibrated-stride-draw-3")
    ]
    assert len(set(map(str, images))) == 3
    assert "agreement over draws" in (tmp_path / "digits_blip2/table.md").read_text()


@pytest.mark.slow
def test_calibrated_is_measured_once_and_is_the_reference(tmp_path: Path, capsys) -> None:
    scorers = "self-attention,calibrated,calibrated self-attention"
    args = ["--models", "digits_blip2", "--scorers", scorers, "--keep", "0.125", "--calibration_draws", "1"]
    sweep(tmp_path, *args, "--questions", "40", "--calibration_questions", "64")
    found = table(tmp_path)
    own = PruningPolicy.load(tmp_path / "digits_blip2/policies/calibrated-self-attention")
    assert own.scorer == "self-attention" and ("calibrated self-attention", "0.125") in found
    assert (
        "reference_ahead" in found["self-attention", "0.125"] and "reference_ahead" not in found["calibrated", "0.125"]
    )
    ratio = found["calibrated", "0.125"]["accuracy"] / found["self-attention", "0.125"]["accuracy"]
    assert f" | {ratio:.2f} |" in (tmp_path / "digits_blip2/table.md").read_text()
    policy = PruningPolicy.load(tmp_path / "digits_blip2/policies/calibrated/keep-0.125.json")
    assert policy.keep == 0.125 and policy.evidence["chosen"]
    written = (tmp_path / "digits_blip2/policies/calibrated/keep-0.125.json").stat().st_mtime_ns
    assert "Calibrating." in capsys.readouterr().out
    sweep(tmp_path, *args, "--questions", "48", "--calibration_questions", "64")  # other questions, the same policy
    assert "Calibrating." not in capsys.readouterr().out
    assert (tmp_path / "digits_blip2/policies/calibrated/keep-0.125.json").stat().st_mtime_ns == written
    sweep(tmp_path, *args, "--questions", "48", "--calibration_questions", "72")
    assert (tmp_path / "digits_blip2/policies/calibrated/keep-0.125.json").stat().st_mtime_ns > written


def test_a_calibration_that_is_refused_is_a_note(tmp_path: Path) -> None:
    args = ["--models", "digits_blip2", "--scorers", "calibrated,stride", "--keep", "4", "--calibration_questions", 2]
    output = sweep(tmp_path, *args)
    assert table(output).keys() == {("no pruning", "None"), ("stride", "4")}
    text = (output / "digits_blip2/table.md").read_text()
    assert "- calibrated: Calibration needs samples in every part of its split" in text
    assert "The reference is *stride*" in text
    before = {path: path.stat().st_mtime_ns for path in (output / "digits_blip2/policies").iterdir()}
    sweep(tmp_path, *args)
    assert {path: path.stat().st_mtime_ns for path in (output / "digits_blip2/policies").iterdir()} == before


class OwnModule(VQAModule):
    """Counts what reaches it."""

    moved = 0


class OwnData(LightningDataModule):
    """A user's datamodule: validation alone, batches without image ids and answers, a hook that moves pixels."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        files = (f"{folder}/questions.json", f"{folder}/images", None, "{image_id:012d}.png")
        self.data = VQADataModule(str(shipped("digits_blip2")), val=VQASplit(*files), batch_size=8)

    def setup(self, stage: str) -> None:
        assert stage == "validate"

    def val_dataloader(self) -> Any:
        wanted = ("inputs", "question_ids")
        batches = [{key: batch[key] for key in wanted} for batch in self.data.val_dataloader()]
        return torch.utils.data.DataLoader(batches, batch_size=None)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        OwnModule.moved += len(batch["question_ids"])
        return batch


def test_a_model_and_data_of_ones_own(tmp_path: Path) -> None:
    write_scenes(tmp_path / "data", "test", 16)
    config = {
        "model": {"class_path": f"{__name__}.OwnModule", "init_args": {"model": "digits_blip2"}},
        "data": {"class_path": f"{__name__}.OwnData", "init_args": {"folder": str(tmp_path / "data")}},
        "trainer": {"accelerator": "cpu"},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    OwnModule.moved = 0
    scorers = ["--scorers", "[stride, calibrated]", "--keep", "0.5", "--output", str(tmp_path / "out")]
    main(["sweep", "--config", str(tmp_path / "own.yaml"), *scorers])
    assert OwnModule.moved == 2 * 16, "unpruned and pruned, through the datamodule's hooks"
    row = table(tmp_path / "out")["stride", "0.5"]
    assert "accuracy" not in row and 0 <= row["agreement"] <= 1 and row["tokens"] == 16
    text = (tmp_path / "out/digits_blip2/table.md").read_text()
    assert "16 questions about 16 images" in text and "- calibrated: The data has no calibration split." in text


def test_a_checkpoint_gives_its_weights_and_an_accuracy_of_0_has_no_share(tmp_path: Path) -> None:
    module = VQAModule(str(shipped("digits_blip2")))
    with torch.no_grad():
        for parameter in module.model.language_model.parameters():
            parameter.zero_()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "zero.ckpt")
    args = ["--models", "digits_blip2", "--scorers", "stride", "--keep", "2"]
    plain = sweep(tmp_path / "out", *args)
    assert table(plain)["no pruning", "None"]["accuracy"] > 0.8
    assert set(
        outcome(sweep(tmp_path / "out", *args, "--ckpt_path", tmp_path / "zero.ckpt"), "stride-keep-2.json")["answers"]
    ) == {""}
    assert table(plain)["stride", "2"]["accuracy_share"] is None
    assert "| stride" not in (plain / "digits_blip2/table.md").read_text()
    assert (
        "| **stride** (control) | 0.000 (0.000 to 0.000) | - | 1.000" in (plain / "digits_blip2/table.md").read_text()
    )


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", *map(str, args)])
    assert stopped.value.code in (1, 2)
    return " ".join(capsys.readouterr().err.partition("catp: error: ")[2].split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--scorers", "fastvlm"],
            r"no scorer 'fastvlm'; known are all, calibrated, catp, .*Did you mean 'fastervlm'\?",
        ),
        (["--scorers", ""], "No scorer is named"),
        (["--keep", "0.5,0.5"], "give one budget or several different ones"),
        (["--keep", "1.5"], "keep is 1.5; keep is a share"),
        (["--keep", "half"], "keep is 'half'; keep is a share"),
        (["--models", "digits_blip"], "no shipped model 'digits_blip'; there are: digits_blip2, digits_llava"),
        (["--config", "mine.yaml", "--models", "digits_blip2"], "give one of them"),
        (["--questions", "many"], "questions"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_written(
    tmp_path: Path, monkeypatch, capsys, args, message
) -> None:
    monkeypatch.chdir(tmp_path)
    found = refused(capsys, *args)
    assert re.search(message, found), found
    assert not list(tmp_path.iterdir())


def test_a_reference_that_is_not_compared_is_refused_with_what_is(tmp_path: Path, capsys) -> None:
    options = ["--questions", 8, "--calibration_questions", 8, "--output", tmp_path, "--scorers", "stride,random"]
    found = refused(capsys, "--models", "digits_blip2", *options, "--reference", "catp")
    assert "The reference 'catp' is none of the methods" in found and "stride, random (3 seeds)" in found
    assert not list(tmp_path.rglob("jobs"))


def test_names_and_budgets_are_lists_or_text() -> None:
    assert listed("a, b") == listed("[a, b]") == listed("['a', \"b\"]") == listed(["a", "b"]) == ["a", "b"]
    assert [repr(keep) for keep in budgets("1, 1.0,0.05")] == ["1", "1.0", "0.05"]
    assert [repr(keep) for keep in budgets([1, 0.5])] == ["1", "0.5"]
    assert named(["stride", "all", "stride"])[0] == "stride" and len(named(["all"])) == len(set(named(["all", "all"])))
    with pytest.raises(PolicyError, match="True"):
        budgets([True])


def test_attention_scorers_are_asked_layer_by_layer_where_that_is_wished() -> None:
    family = find_family(VQAModule(str(shipped("digits_llava"))))
    names = ["fastv", "fastervlm", "pyramiddrop", "stride", "catp"]
    plain, refused_ = rules(names, family, layers=False)
    assert [rule.title for rule in plain] == names[:4] and refused_.keys() == {"catp"}
    found, refused_ = rules(names, family, layers=True)
    assert refused_.keys() == {"catp"}
    args = {rule.title: rule.args for rule in found if "layer" in rule.title}
    assert args == {
        **{f"fastv at layer {n}": {"layer": n} for n in (1, 2, 3)},
        **{f"fastervlm layer {n}": {"layers": [n]} for n in (0, 1, 2)},
    }


def test_tokens_per_layer_is_the_mean_over_layers_of_what_each_reads() -> None:
    """PyramidDrop on 144 tokens, stages at layers 1, 2, 3 of 4: counted from what is kept at each stage."""
    module = VQAModule(str(shipped("digits_llava")))
    inputs = _llava_inputs(3)
    with torch.no_grad(), prune(module, PruningPolicy("pyramiddrop", keep=0.125)) as pruning:
        module.model.generate(**inputs, max_new_tokens=2, do_sample=False)
        module.model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert pruning.leave_at == (1, 2, 3)
        assert [found.tolist() for found in pruning.tokens_per_layer] == [[(144 + 72 + 36 + 18) / 4] * 3] * 2
    with torch.no_grad(), prune(module, PruningPolicy("stride", keep=0.125)) as pruning:
        module.model(**inputs)
        assert [found.tolist() for found in pruning.tokens_per_layer] == [[18.0] * 3]


def _llava_inputs(count: int) -> dict[str, torch.Tensor]:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(shipped("digits_llava"))
    rng = np.random.default_rng(0)
    images = [[Image.fromarray(rng.integers(0, 255, (96, 96, 3), np.uint8))] for _ in range(count)]
    text = [PROMPTS["digits_llava"].replace("{}", "Is there a 3?")] * count
    return dict(processor(images=images, text=text, return_tensors="pt", padding=True))


def test_token_pruning_logs_tokens_per_layer_only_where_tokens_leave_inside_the_decoder() -> None:
    module, inputs = VQAModule(str(shipped("digits_llava"))), _llava_inputs(2)
    batch = {"inputs": inputs, "question_ids": torch.arange(2)}
    loader = torch.utils.data.DataLoader([batch, batch], batch_size=None)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    found = {}
    for scorer, keep in (("fastv", 0.25), ("stride", 0.25), ("fastv", 144)):
        callback = TokenPruning(PruningPolicy(scorer, keep=keep))
        Trainer(accelerator="cpu", callbacks=[callback], **quiet).predict(module, loader)
        found[scorer, keep] = callback.figures
    assert found["fastv", 0.25]["catp/tokens_per_layer"] == (144 + 144 + 36 + 36) / 4
    assert found["stride", 0.25].keys() == found["fastv", 144].keys() == {"catp/tokens_kept", "catp/keep_share"}


def test_one_token_and_everything_are_two_budgets_in_a_table_and_a_plot() -> None:
    same = np.array([1.0, 0.0, 1.0])
    results = [Result("no pruning", None, None, np.ones(3), 32.0), Result("a", 1, None, same, 1.0)]
    results += [Result("a", 1.0, None, np.ones(3), 32.0), Result("b", 1, None, 1 - same, 0.0, 8.0)]
    rows = [{**row, "control": False} for row in Comparison([1, 2, 3], "a", results).rows()]
    found = ModelTable("m", "3 questions.", "a", rows)
    assert [(row["method"], row["keep"], row["agreement"]) for row in found.at(1)[1:]] == [
        ("a", 1, pytest.approx(2 / 3)),
        ("b", 1, pytest.approx(1 / 3)),
    ]
    assert [(row["method"], row["agreement"]) for row in found.at(1.0)[1:]] == [("a", 1.0)]
    assert [repr(keep) for keep in found.budgets] == ["1", "1.0"]
    lines = {line.get_label(): line for line in figure([found]).axes[0].get_lines()}
    assert list(lines["a"].get_xdata()) == [1, 32] and list(lines["b"].get_xdata()) == [8], "0 is on no log axis"


@pytest.mark.parametrize("budgets", [(4,), (4, 8)])
def test_the_band_of_the_reference_is_seen_whole(budgets: tuple[int, ...]) -> None:
    same = np.array([1.0, 0.0, 1.0, 1.0] * 2)
    results = [Result("no pruning", None, None, np.ones(8), 32.0)]
    results += [Result(name, keep, None, same, float(keep)) for name in ("a", "b") for keep in budgets]
    comparison = Comparison(range(8), "a", results)
    rows = [{**row, "control": False} for row in comparison.rows()]
    for axes in (figure([ModelTable("m", "8 questions.", "a", rows)]).axes[0], plain(rows, "a", "agreement").axes[0]):
        bottom, top = axes.get_ylim()
        _band, ends = axes.collections  # of one budget a band has no width
        for row, segment in zip((row for row in rows if row["method"] == "a"), ends.get_segments(), strict=True):
            low, high = row["agreement_interval"]
            assert segment[:, 1].tolist() == pytest.approx([low, high]) and high - low > 0.3
            assert bottom < low and high < top
        assert "logarithmic" in axes.get_xlabel() and axes.get_xscale() == "log"


@pytest.mark.parametrize("model", SHIPPED)
def test_scenes_and_prompts_of_a_shipped_model_are_those_of_its_configuration(tmp_path, monkeypatch, model) -> None:
    config = yaml.safe_load((ROOT / f"configs/{model}.yaml").read_text())
    assert config["model"]["model"] == config["data"]["processor"] == model
    assert config["data"].get("prompt", VQADataModule("x").prompt) == PROMPTS[model]
    monkeypatch.chdir(tmp_path)
    folder = str(Path(config["data"]["test"]["questions"]).parents[1])
    main(["scenes", "--model", model, "--output", folder, "--questions", "16", "--calibration_questions", "4"])
    for split in ("calibration", "test"):
        assert Path(config["data"][split]["questions"]).is_file() and Path(config["data"][split]["images"]).is_dir()
    sizes = {Image.open(path).size for path in Path(config["data"]["test"]["images"]).iterdir()}
    assert sizes <= {(CELL * columns, CELL * rows) for rows, columns in GRIDS[model]}
    assert len(sizes) > 1 or len(GRIDS[model]) == 1


def test_scenes_for_an_unknown_model_are_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no shipped model 'letters'"):
        shipped("letters")
    with pytest.raises(SystemExit, match="2"):
        main(["scenes", "--model", "letters"])
    assert not list(tmp_path.iterdir())
