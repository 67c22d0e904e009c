"""The `catp` command: real models, data and files; most runs in this process, a few in one of their own."""

import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from torch import Tensor

from catp_lightning.calibration.perturbations import PERTURBATIONS
from catp_lightning.cli.main import main
from catp_lightning.data.vqa import VQADataModule
from catp_lightning.modules.vqa import VQAModule
from catp_lightning.policy import PruningPolicy
from catp_lightning.policy.locations import budget_file_name
from catp_lightning.utils import progress
from tests.support.commands import answers, asked, catp, fails, printed, process, split
from tests.support.processes import environment
from tests.support.tiny_vqa import QUERIES


class OwnModule(VQAModule):
    """A user's module; says what it is given to answer."""

    asked: list[int] = []  # noqa: RUF012

    def predict_step(self, batch, batch_idx):
        self.asked += batch["question_ids"].tolist()
        return super().predict_step(batch, batch_idx)


class OwnData(VQADataModule):
    """A user's datamodule; says for which stages it was set up."""

    stages: list[str] = []  # noqa: RUF012

    def setup(self, stage: str) -> None:
        self.stages.append(stage)
        super().setup(stage)


STRIDE = ["--scorer", "stride"]  # a calibration without probes


class WithoutCalibration(VQADataModule):
    calibration_dataloader = property()  # hasattr says no


@pytest.mark.usefixtures("undrawn")
def test_a_policy_is_calibrated_validated_and_predicted_with(made, capsys):
    catp(made, "calibrate", "--output", "policies")
    policy = PruningPolicy.load("policies/policy.json")
    assert policy.keep == 0.5, "without --keep"
    assert sum(policy.evidence["samples"].values()) == 16
    catp(made, "validate", "--policy", "policies", "--compare", "true")
    metrics = printed(capsys.readouterr().out)
    assert metrics["catp/tokens_kept"] == QUERIES / 2
    assert 0 <= metrics["catp/agreement"] <= 1
    assert "val/vqa_accuracy" in metrics
    catp(made, "predict", "--policy", "policies", "--output", "results/answers.jsonl")
    assert list(answers("results/answers.jsonl")) == asked(made)
    files = {str(path) for path in Path().rglob("*") if path.is_file()}
    reports = {file for file in files if file.startswith("policies/report/")}
    assert files - reports == {"policies/policy.json", "results/answers.jsonl"}  # no logs, no checkpoints
    assert {"policies/report/report.md", "policies/report/retention.png"} < reports


@pytest.mark.slow
def test_calibration_ends_with_what_was_chosen_what_it_keeps_and_what_it_cost(made):
    command = [sys.executable, "-c", "from catp_lightning.cli.main import main; main()", "calibrate"]
    options = ["--keep", "[0.5, 1]", "--trainer.enable_progress_bar", "true", "--output", "policies"]
    done = subprocess.run(
        [*command, "--config", str(made / "tiny.yaml"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,  # as on a terminal, where the bar and the lines meet
        text=True,
        check=True,
        timeout=900,
        env=environment(),
    )
    chosen, keeps, cost = done.stdout.rstrip("\n").split("\n")[-3:]
    policies = [PruningPolicy.load("policies", keep=budget) for budget in (0.5, 1)]
    assert chosen.startswith("catp: chosen: ")
    assert all(f"{policy.evidence['chosen']} at keep {policy.keep}" in chosen for policy in policies)
    assert keeps.startswith("catp: keeps: of ")
    assert re.search(rf"with 2 of {QUERIES} tokens, (ahead of|level with|behind) [^;]*; ", keeps)
    assert re.search(rf" with 1 of {QUERIES} tokens, [^;]* \([^)]*\)$", keeps)
    assert re.fullmatch(r"catp: cost: [\d.]+ s for 16 samples(, [\d.]+ times the prediction alone)?", cost)
    assert done.stdout.count("catp: chosen: ") == 1
    assert f"- **Chosen**: {chosen.removeprefix('catp: chosen: ')}\n" in Path("policies/report/report.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_a_promise_writes_one_policy_whatever_the_budgets(made):
    promise = ["--max_disagreement", 0.9, "--confidence", 0.2, *STRIDE]
    catp(made, "calibrate", *promise, "--output", "promised")
    policy = PruningPolicy.load("promised/policy.json")
    found = policy.evidence["promise"]
    assert (found["max_disagreement"], found["confidence"]) == (0.9, 0.2)
    assert [step["keep"] for step in found["steps"]] == [0.75, 0.5, 0.25]  # of the grid, what differs on 4 tokens
    catp(made, "calibrate", *promise, "--keep", "[3, 1]", "--output", "few.json")
    assert [step["keep"] for step in PruningPolicy.load("few.json").evidence["promise"]["steps"]] == [3, 1]
    assert {path.name for path in Path("promised").iterdir()} == {"policy.json"}


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_a_promise_is_made_for_each_type_of_answer_over_questions(made):
    promise = ["--max_disagreement", 0.9, "--confidence", 0.1, "--over", "questions", "--group_by", "answer_types"]
    catp(made, "calibrate", *promise, *STRIDE, "--output", "p.json")
    found = PruningPolicy.load("p.json").evidence["promise"]
    annotations = json.loads((made / "calibration/annotations.json").read_text())["annotations"]
    assert {group["name"] for group in found["groups"]} == {record["answer_type"] for record in annotations}
    assert (found["over"], found["group_by"]) == ("questions", "answer_types") and len(found["groups"]) == 3
    assert sum(group["questions"] for group in found["groups"]) == found["questions"]


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_several_budgets_go_to_a_folder_where_keep_chooses(made, capsys):
    catp(made, "calibrate", *STRIDE, "--output", "policies", "--keep", "[0.5, 1]")
    assert {path.name for path in Path("policies").iterdir()} == {"keep-0.5.json", "keep-1.json"}
    capsys.readouterr()
    catp(made, "test", "--policy", "policies", "--keep", "1")
    assert printed(capsys.readouterr().out)["catp/tokens_kept"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "tokens"), [("1", 1), ("1.0", QUERIES), ("5e-1", 2)])
def test_keep_is_tokens_without_a_point_and_a_share_with_one(made, capsys, keep, tokens):
    for budget in (1, 1.0, 0.5):
        PruningPolicy("stride", keep=budget).save(Path("policies") / budget_file_name(budget))
    catp(made, "test", "--policy", "policies", "--keep", keep)
    assert printed(capsys.readouterr().out)["catp/tokens_kept"] == tokens


@pytest.mark.slow
def test_a_policy_or_a_rule_changes_answers_and_neither_is_the_unpruned_model(made, capsys):
    policies = {"all": ("stride", 1.0), "one": ("stride", 1), "drawn": ("random", 1)}
    for name, (scorer, keep) in policies.items():
        drawn = {"scorer_args": {"seed": 3}, "selector": "dpp"} if scorer == "random" else {}
        PruningPolicy(scorer, keep=keep, **drawn).save(f"{name}.json")
        catp(made, "predict", "--policy", f"{name}.json", "--output", f"{name}.jsonl")
    rule = ["--scorer", "random", "--scorer_args", "{seed: 3}", "--selector", "dpp", "--keep", "1"]
    catp(made, "predict", *rule, "--output", "rule.jsonl")
    catp(made, "predict", "--output", "full.jsonl")
    assert answers("all.jsonl") == answers("full.jsonl") != answers("one.jsonl")
    assert answers("rule.jsonl") == answers("drawn.jsonl") != answers("full.jsonl")
    capsys.readouterr()
    catp(made, "validate")
    assert set(printed(capsys.readouterr().out)) == {"val/vqa_accuracy"}
    catp(made, "validate", "--scorer", "stride", "--compare", "true")
    metrics = printed(capsys.readouterr().out)
    assert metrics["catp/tokens_kept"] == QUERIES / 2  # without --keep half of them
    assert 0 <= metrics["catp/agreement"] <= 1


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_own_classes_and_callbacks_are_named_in_yaml(made, capsys):
    for budget in (1, 1.0):
        PruningPolicy("stride", keep=budget).save(Path("policies") / budget_file_name(budget))
    config = yaml.safe_load((made / "tiny.yaml").read_text())
    config["model"] = {"class_path": f"{__name__}.OwnModule", "init_args": config["model"]}
    config["data"] = {"class_path": f"{__name__}.OwnData", "init_args": config["data"]}
    pruning = {"policy": "policies", "keep": 1}
    config["trainer"]["callbacks"] = [{"class_path": "catp_lightning.TokenPruning", "init_args": pruning}]
    Path("mine.yaml").write_text(yaml.safe_dump(config))
    OwnModule.asked, OwnData.stages = [], []
    main(["test", "--config", "mine.yaml"])
    assert printed(capsys.readouterr().out)["catp/tokens_kept"] == 1  # an int in YAML stays a number of tokens
    without = ["--trainer.callbacks", "null", "--examples", "0"]
    main(["calibrate", "--config", "mine.yaml", *without, *STRIDE, "--output", "calibrated.json"])
    read = Counter(OwnModule.asked)  # what it recorded stays in memory
    assert read.keys() == set(asked(made, "calibration")) and set(read.values()) == {1}
    assert OwnData.stages == ["test", "calibration"]


def dim(pixels: Tensor) -> Tensor:
    return pixels / 2


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_perturbations_are_named_by_an_option_or_in_yaml(made, capsys):
    catp(made, "calibrate", *STRIDE, "--augment", "[noise, blur]", "--output", "p.json")
    assert list(PruningPolicy.load("p.json").evidence["perturbed"]) == ["noise", "blur"]
    status, message = fails(capsys, "calibrate", "--config", made / "tiny.yaml", "--augment", "[nois]")
    assert status == 2 and "There is no perturbation 'nois'. Did you mean 'noise'?" in message
    config = yaml.safe_load((made / "tiny.yaml").read_text())
    data = config["data"]
    data["predict"] = data["calibration"]
    for given, names in (("default", list(PERTURBATIONS)), ({"own": f"{__name__}.dim"}, ["own"])):
        options = {"path": "q.json", "scorer": "stride", "augment": given}
        config["trainer"]["callbacks"] = [
            {"class_path": "catp_lightning.CrossAttentionCalibration", "init_args": options}
        ]
        Path("mine.yaml").write_text(yaml.safe_dump(config))
        main(["predict", "--config", "mine.yaml"])
        assert list(PruningPolicy.load("q.json").evidence["perturbed"]) == names


@pytest.mark.usefixtures("no_report")
def test_a_datamodule_without_calibration_split_is_calibrated_on_its_prediction_split(made):
    data = ["--data", f"{__name__}.WithoutCalibration", "--data.predict", json.dumps(split(made / "calibration"))]
    catp(made, "calibrate", *data, *STRIDE, "--output", "policy.json")
    assert sum(PruningPolicy.load("policy.json").evidence["samples"].values()) == 16


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("predict", ["--output", "answers.jsonl"], r"predict: batch 2 of 3"),
        ("validate", [], r"validate: batch 2 of 3"),
        ("test", ["--scorer", "stride"], r"test: batch 2 of 3"),
        (
            "calibrate",
            [*STRIDE, "--output", "policy.json"],
            r"measuring what each visual token is worth, batch [2-3] of 4, about \d+ s left",
        ),
    ],
)
def test_without_a_terminal_lines_say_how_far_a_command_is(made, capsys, monkeypatch, command, options, said):
    monkeypatch.setattr(progress, "EVERY", 0.05)
    module = {"class_path": f"{__name__}.Slow", "init_args": {"model": str(made / "model")}}
    bars = ["--trainer.enable_progress_bar", "true", "--model", json.dumps(module)]
    catp(made, command, *bars, *options)
    lines = re.findall(r"^catp: (.*), \d+ s$", capsys.readouterr().err, re.MULTILINE)
    assert any(line == f"{command}: preparing" for line in lines)
    assert any(re.fullmatch(said, line) for line in lines)


class Slow(VQAModule):
    def answer(self, batch):
        time.sleep(0.12)
        return super().answer(batch)


@pytest.mark.slow
def test_a_process_of_its_own_prints_metrics_and_no_advertisement(made):
    done = process("validate", "--config", made / "tiny.yaml")
    assert done.returncode == 0, done.stderr
    assert set(printed(done.stdout)) == {"val/vqa_accuracy"}
    assert not re.search("Tip|Warning|many workers|LeafSpec|deprecated", done.stderr + done.stdout)


@pytest.mark.slow
def test_a_profile_is_a_table_of_parts_unpruned_and_pruned(made, capsys):
    catp(made, "profile", *STRIDE, "--keep", "1")
    table = capsys.readouterr().out
    assert "| ms, medians | unpruned | pruned | times as fast |" in table
    assert all(f"\n| {part} | " in table for part in ("vision", "prefill", "a decoding step", "samples per second"))
    assert re.search(r"\| the whole call \| [\d.]+ \| [\d.]+ \| [\d.]+ \|", table)
    code, message = fails(capsys, "profile", "--config", made / "tiny.yaml")
    assert code == 2 and "Give --policy or --scorer" in message
