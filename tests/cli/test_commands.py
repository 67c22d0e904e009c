"""The `catp` command: real models, data and files; most runs in this process, a few in one of their own."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentError

import catp_lightning
from catp_lightning.cli.main import SUMMARIES, main
from catp_lightning.data import shipped
from catp_lightning.data.scenes import write_scenes
from catp_lightning.data.vqa import VQADataModule
from catp_lightning.errors import DataError, PolicyError
from catp_lightning.modules.vqa import VQAModule
from catp_lightning.policy import PruningPolicy
from catp_lightning.policy.locations import budget_file_name
from catp_lightning.utils import progress
from tests.support.paths import ROOT
from tests.support.processes import environment
from tests.support.tiny_vqa import QUERIES, opt_config, save_model, scenes

CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
QUESTIONS = 10
BLIP2 = {"type": "blip-2", "visual_tokens": 32, "cross_attention_layers": 6, "heads": 12}


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


class WithoutCalibration(VQADataModule):
    calibration_dataloader = property()  # hasattr says no


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, scenes for calibration and test, and a configuration that names them."""
    folder = tmp_path_factory.mktemp("made")
    model = save_model(folder / "model", opt_config())
    write_scenes(folder / "calibration", "calibration", 32)
    splits = {"calibration": "calibration", "val": "test", "test": "test"}
    scenes(folder / "test", QUESTIONS)
    data = {name: split(folder / place) for name, place in splits.items()}
    config = {
        "model": {"model": model},
        "data": {"processor": model, "batch_size": 4, **data},
        "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def split(folder: Path) -> dict[str, str]:
    names = {"questions": "questions.json", "annotations": "annotations.json", "images": "images"}
    return {key: str(folder / name) for key, name in names.items()} | {"image_name": "{image_id:012d}.png"}


def catp(made: Path, command: str, *args: object) -> None:
    main([command, "--config", str(made / "tiny.yaml"), *map(str, args)])


def printed(output: str) -> dict[str, float]:
    """The table that Lightning prints."""
    return {name: float(value) for name, value in re.findall(r"((?:catp|val|test)/\w+)\W+([\d.]+)", output)}


def answers(path: str | Path) -> dict[int, str]:
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    found = {line["question_id"]: line["answer"] for line in lines}
    assert len(found) == len(lines)  # no question twice
    return found


def asked(made: Path, name: str = "test") -> list[int]:
    questions = json.loads((made / name / "questions.json").read_text())["questions"]
    return [question["question_id"] for question in questions]


def everything(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def fails(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    """Exit status and message of a command that must fail; it must leave every file as it was."""
    before = everything(Path.cwd())
    with pytest.raises(SystemExit) as stopped:
        main([str(arg) for arg in args])
    after = everything(Path.cwd())
    assert {file: content for file, content in after.items() if "rank0" not in file.name} == before  # answers are kept
    output, errors = capsys.readouterr()
    assert "Traceback" not in output + errors
    _, *messages = errors.split("catp: error: ")
    assert len(messages) == 1
    return stopped.value.code, messages[0]


def test_a_policy_is_calibrated_validated_and_predicted_with(made, capsys):
    catp(made, "calibrate", "--output", "policies")
    policy = PruningPolicy.load("policies/policy.json")
    assert policy.keep == 0.5, "without --keep"
    assert sum(policy.evidence["samples"].values()) == 32
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
    assert re.fullmatch(r"catp: cost: [\d.]+ s for 32 samples(, [\d.]+ times the prediction alone)?", cost)
    assert done.stdout.count("catp: chosen: ") == 1
    assert f"- **Chosen**: {chosen.removeprefix('catp: chosen: ')}\n" in Path("policies/report/report.md").read_text()


def test_a_promise_writes_one_policy_whatever_the_budgets(made):
    promise = ["--max_disagreement", 0.9, "--confidence", 0.2]
    catp(made, "calibrate", *promise, "--output", "promised")
    policy = PruningPolicy.load("promised/policy.json")
    found = policy.evidence["promise"]
    assert (found["max_disagreement"], found["confidence"]) == (0.9, 0.2)
    assert [step["keep"] for step in found["steps"]] == [0.75, 0.5, 0.25]  # of the grid, what differs on 4 tokens
    catp(made, "calibrate", *promise, "--keep", "[3, 1]", "--output", "few.json")
    assert [step["keep"] for step in PruningPolicy.load("few.json").evidence["promise"]["steps"]] == [3, 1]
    assert {path.name for path in Path("promised").iterdir()} == {"policy.json", "report"}


def test_several_budgets_go_to_a_folder_where_keep_chooses(made, capsys):
    catp(made, "calibrate", "--output", "policies", "--keep", "[0.5, 1]")
    assert {path.name for path in Path("policies").iterdir()} == {"keep-0.5.json", "keep-1.json", "report"}
    capsys.readouterr()
    catp(made, "test", "--policy", "policies", "--keep", "1")
    assert printed(capsys.readouterr().out)["catp/tokens_kept"] == 1


@pytest.mark.parametrize(("keep", "tokens"), [("1", 1), ("1.0", QUERIES), ("3", 3), ("0.5", 2), ("5e-1", 2)])
def test_keep_is_tokens_without_a_point_and_a_share_with_one(made, capsys, keep, tokens):
    for budget in (1, 1.0, 3, 0.5):
        PruningPolicy("stride", keep=budget).save(Path("policies") / budget_file_name(budget))
    catp(made, "test", "--policy", "policies", "--keep", keep)
    assert printed(capsys.readouterr().out)["catp/tokens_kept"] == tokens


def test_a_policy_changes_answers_and_no_policy_is_the_unpruned_model(made, capsys):
    catp(made, "predict", "--output", "full.jsonl")
    for name, keep in (("all", 1.0), ("one", 1)):
        PruningPolicy("stride", keep=keep).save(f"{name}.json")
        catp(made, "predict", "--policy", f"{name}.json", "--output", f"{name}.jsonl")
    assert answers("all.jsonl") == answers("full.jsonl") != answers("one.jsonl")
    catp(made, "validate")
    assert set(printed(capsys.readouterr().out)) == {"val/vqa_accuracy"}


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
    main(["calibrate", "--config", "mine.yaml", "--trainer.callbacks", "null", "--output", "calibrated.json"])
    read = Counter(OwnModule.asked)  # calibration reads its split several times
    assert read.keys() == set(asked(made, "calibration")) and len(set(read.values())) == 1
    assert min(read.values()) >= 3
    assert OwnData.stages == ["test", "calibration"]


def test_a_datamodule_without_calibration_split_is_calibrated_on_its_prediction_split(made):
    data = ["--data", f"{__name__}.WithoutCalibration"]
    catp(made, "calibrate", *data, "--data.predict", json.dumps(split(made / "calibration")), "--output", "policy.json")
    assert sum(PruningPolicy.load("policy.json").evidence["samples"].values()) == 32


def test_a_policy_for_another_architecture_is_refused_by_both_names(made, capsys):
    PruningPolicy("catp", model=BLIP2).save("policy.json")
    status, message = fails(capsys, "validate", "--config", made / "tiny.yaml", "--policy", "policy.json")
    assert status == 2
    assert "made for blip-2 with 32 visual tokens" in message
    assert f"this model is blip-2 with {QUERIES} visual tokens" in message


def test_a_truncated_policy_is_refused_before_the_model_is_loaded(made, capsys):
    file = PruningPolicy("catp").save("policy.json")
    file.write_text(file.read_text()[:100])
    missing = ["--model.model", "no/model"]  # would fail too, and says something else
    status, message = fails(capsys, "test", "--config", made / "tiny.yaml", *missing, "--policy", "policy.json")
    assert status == 2
    assert "policy.json cannot be read as a policy" in message


@pytest.mark.parametrize("command", ["validate", "test", "predict", "calibrate"])
def test_a_missing_dataset_file_is_named(made, capsys, command):
    name = {"validate": "val", "calibrate": "calibration"}.get(command, "test")
    options = ["--output", "new"] if command in ("predict", "calibrate") else []
    missing = [f"--data.{name}.questions", "nowhere.json"]
    status, message = fails(capsys, command, "--config", made / "tiny.yaml", *missing, *options)
    assert status == 2
    assert "nowhere.json: there is no such file" in message


@pytest.mark.parametrize("command", ["predict", "calibrate"])
def test_a_corrupt_image_ends_a_run_and_leaves_an_old_file_as_it_was(made, tmp_path, capsys, command):
    shutil.copytree(made / "calibration", "scenes")
    last = max(Path("scenes/images").iterdir())
    last.write_bytes(last.read_bytes()[:200])
    Path("old.json").write_text("old\n")
    place = [f"--data.{'test' if command == 'predict' else 'calibration'}", json.dumps(split(tmp_path / "scenes"))]
    status, message = fails(capsys, command, "--config", made / "tiny.yaml", *place, "--output", "old.json")
    assert status == 1
    assert last.name in message
    assert "cannot be read" in message


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["validate", "--keep", "0.5"], 2, "give --policy or --scorer"),
        (["test", "--policy", "policies"], 2, "several budgets (1, 2)"),
        (["test", "--policy", "policies", "--keep", "3"], 2, "keep=3; it has 1, 2"),
        (["test", "--policy", "nowhere"], 2, "no policy at 'nowhere'"),
        (["test", "--policy", "policies", "--keep", "half"], 2, "keep is 'half'"),
        (["test", "--policy", "policies", "--scorer", "stride"], 2, "give one of them"),
        (["test", "--scorer", "strid"], 2, "Did you mean 'stride'?"),
        (["test", "--scorer", "stride", "--scorer_args", "{layer: 2}"], 2, "no argument 'layer'"),
        (["test", "--scorer", "stride", "--selector", "best"], 2, "no selector 'best'"),
        (["test", "--scorer", "stride", "--keep", "0"], 2, "keep is 0"),
        (["test", "--scorer", "fastervlm"], 2, "does not show"),
        (["test", "--scorer_args", "{layer: 2}"], 2, "--scorer: give it as well"),
        (["predict", "--output", "new.jsonl", "--selector", "dpp"], 2, "--scorer: give it as well"),
        (["test", "--polcy", "policies"], 2, "Did you mean --policy?"),
        (["test", "--config", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["test", "--model.model", "/nowhere/model"], 2, "no model in /nowhere/model"),
        (["test", "--data.fraction", "2"], 2, "fraction must be in (0, 1], got 2.0"),
        (["test", "--ckpt_path", "nowhere.ckpt"], 2, "nowhere.ckpt"),
        (["predict"], 2, "give --output"),
        (["predict", "--output", "policies"], 2, "policies is a folder"),
        (["predict", "--output", "file/answers.jsonl"], 2, "is not a folder"),
        (["calibrate", "--keep", "0"], 2, "keep is 0"),
        (["calibrate", "--keep", "2.0"], 2, "keep=2, without the point"),
        (["calibrate", "--keep", "[0.5, 1]", "--output", "policy.json"], 2, "give a folder"),
        (["calibrate", "--output", "file"], 2, "file is a file"),
        (["calibrate", "--output", "taken.json"], 2, "taken-report is a file"),
        (["calibrate", "--max_disagreement", "2"], 2, "For 2 percent write 0.02"),
        (["calibrate", "--max_disagreement", "few"], 2, "max_disagreement"),
        (["calibrate", "--max_disagreement", "0.02", "--confidence", "1"], 2, "confidence is 1"),
        (["calibrate", "--max_disagreement", "0.001"], 1, "takes at least 2995 there"),
        (["calibrate", "--confidence", "0.9"], 2, "give --max_disagreement"),
        (["calibrate", "--data.fraction", "0.03"], 1, "some dozens of images"),
        (["test", "--data.test", "null"], 2, "test"),
        (["predict", "--trainer.accelerator", "abacus", "--output", "new.jsonl"], 2, "abacus"),
        (["forecast"], 2, "no command 'forecast'"),
        (["calibrat"], 2, "Did you mean 'calibrate'?"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_message(made, capsys, args, status, said):
    for keep in (1, 2):
        PruningPolicy("stride", keep=keep).save(f"policies/keep-{keep}.json")
    for name in ("file", "taken-report"):
        Path(name).write_text("")
    config = ["--config", made / "tiny.yaml"]
    found, message = fails(capsys, args[0], *config, *args[1:])
    assert said in message
    assert found == status
    assert message.count("\n") == 1 or "lists the options" in message


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["scenes", "--qestions", "4"], "Did you mean --questions?"),
        (["scenes", "--questions", "0"], "0 for the test split; it must be at least 1"),
        (["scenes", "--calibration_questions", "-1"], "-1 for the calibration split"),
        (["scenes", "--model", "digits"], "no shipped model 'digits'"),
        (["scenes", "--output", "file"], "--output file is a file"),
        (["demo", "--seed", "-1"], "seed is -1"),
        (["demo", "--questions", "many"], "many"),
        (["demo", "--output", "file/demo"], "file is not a folder"),
    ],
)
def test_scenes_and_demo_refuse_a_wrong_value_before_anything_is_written(capsys, args, said):
    Path("file").write_text("")
    status, message = fails(capsys, *args)
    assert status == 2
    assert said in message


def test_a_fixed_rule_is_named_on_the_command_line(made, capsys):
    PruningPolicy("random", {"seed": 3}, "dpp", keep=1).save("policy.json")
    catp(made, "predict", "--policy", "policy.json", "--output", "policy.jsonl")
    rule = ["--scorer", "random", "--scorer_args", "{seed: 3}", "--selector", "dpp"]
    catp(made, "predict", *rule, "--keep", "1", "--output", "rule.jsonl")
    catp(made, "predict", "--output", "full.jsonl")
    assert answers("rule.jsonl") == answers("policy.jsonl") != answers("full.jsonl")
    capsys.readouterr()
    catp(made, "validate", "--scorer", "stride", "--compare", "true")
    metrics = printed(capsys.readouterr().out)
    assert metrics["catp/tokens_kept"] == QUERIES / 2  # without --keep half of them
    assert 0 <= metrics["catp/agreement"] <= 1


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("predict", ["--output", "answers.jsonl"], r"predict: batch 2 of 3"),
        ("validate", [], r"validate: batch 2 of 3"),
        ("test", ["--scorer", "stride"], r"test: batch 2 of 3"),
        ("calibrate", ["--output", "policy.json"], r"round 1 of 1, \d+ candidates, batch [4-7] of 8"),
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


def test_answers_of_another_layout_end_in_the_writers_message(made, capsys):
    module = {"class_path": f"{__name__}.Wordless", "init_args": {"model": str(made / "model")}}
    status, message = fails(
        capsys, "predict", "--config", made / "tiny.yaml", "--model", json.dumps(module), "--output", "answers.jsonl"
    )
    assert status == 1
    assert "Wordless.predict_step to return a list" in message


class Wordless(VQAModule):
    def predict_step(self, batch, batch_idx):
        return batch["question_ids"]


def test_the_traceback_is_shown_where_the_environment_asks_for_it(made, monkeypatch):
    monkeypatch.setenv("CATP_TRACEBACK", "1")
    with pytest.raises(PolicyError):
        catp(made, "test", "--policy", "nowhere")
    with pytest.raises(ArgumentError):
        catp(made, "test", "--nothing", "1")


def test_a_corrupt_image_read_by_a_worker_process_is_one_message(made, tmp_path, capsys):
    shutil.copytree(made / "test", "scenes")
    first = min(Path("scenes/images").iterdir())
    first.write_bytes(b"not an image")
    place = ["--data.num_workers", 1, "--data.test", json.dumps(split(tmp_path / "scenes"))]
    status, message = fails(capsys, "predict", "--config", made / "tiny.yaml", *place, "--output", "answers.jsonl")
    assert status == 1
    assert message.startswith(f"{tmp_path / 'scenes/images' / first.name}, the image of question")
    assert message.endswith("leave its questions out of the questions file.\n")


def process(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from catp_lightning.cli.main import main; main()", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, env=environment())


@pytest.mark.slow
def test_a_process_of_its_own_prints_metrics_and_no_advertisement(made):
    done = process("validate", "--config", made / "tiny.yaml")
    assert done.returncode == 0, done.stderr
    assert set(printed(done.stdout)) == {"val/vqa_accuracy"}
    assert not re.search("Tip|Warning|many workers|LeafSpec|deprecated", done.stderr + done.stdout)


def test_a_process_of_its_own_that_fails_ends_with_its_status_and_the_message(made):
    PruningPolicy("catp", model=BLIP2).save("policy.json")
    done = process("predict", "--config", made / "tiny.yaml", "--policy", "policy.json", "--output", "answers.jsonl")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.search(r"catp: error: The policy was made for blip-2 .*\n$", done.stderr)
    assert not Path("answers.jsonl").exists()


@pytest.mark.parametrize(
    ("command", "options"),
    {
        "calibrate": [
            "--config",
            "--keep",
            "--max_disagreement",
            "--confidence",
            "--output",
            "--model",
            "--data",
            "--trainer.devices",
            "--ckpt_path",
        ],
        "validate": [
            "--config",
            "--policy",
            "--scorer",
            "--scorer_args",
            "--selector",
            "--keep",
            "--compare",
            "--model",
            "--data",
            "--trainer.precision",
        ],
        "test": ["--config", "--policy", "--keep", "--compare", "--ckpt_path"],
        "predict": ["--config", "--policy", "--keep", "--compare", "--output"],
        "scenes": ["--output", "--questions", "--calibration_questions", "--seed"],
        "demo": ["--output", "--questions", "--calibration_questions", "--seed"],
    }.items(),
)
def test_help_of_a_command_says_what_it_does_and_names_its_options(capsys, command, options):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert SUMMARIES[command] in " ".join(text.split())
    missing = [option for option in options if f" {option} " not in text]
    assert not missing
    assert "max_epochs" not in text  # of training


def test_help_names_every_command_and_shipped_configuration(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(f"\n  {command} " in text and f"catp {command}" in text for command in SUMMARIES)
    assert CONFIGS
    assert all(name in text for name in CONFIGS)


def test_help_versions_and_misspelt_commands_import_nothing_that_takes_long():
    code = """
import sys
from catp_lightning.cli.main import main
for args in ([], ["--version"], ["calibrat"], ["demo", "--help"], ["scenes", "--qestions", "4"]):
    before = {"torch", "lightning", "transformers", "sklearn", "numpy"} & sys.modules.keys()
    try:
        main(args)
    except SystemExit as error:
        status = error.code
    print("ended", status, before, "jsonargparse" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=900)
    ended = [line for line in done.stdout.splitlines() if line.startswith("ended")]
    light = ["ended 0 set() False", "ended 0 set() False", "ended 2 set() False"]
    assert ended == [*light, "ended 0 set() True", "ended 2 set() True"]


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert re.match(r"catp-lightning \S+", capsys.readouterr().out)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("command", ["calibrate", "predict"])
def test_every_configuration_is_read_and_printed_whole(capsys, name, command):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--config", str(ROOT / "configs" / name), "--print_config"])
    assert stopped.value.code == 0
    config, given = (yaml.safe_load(text) for text in (capsys.readouterr().out, (ROOT / "configs" / name).read_text()))
    assert config["model"]["init_args"]["model"] == given["model"]["model"]
    for split_name in ("calibration", "val"):
        assert given["data"][split_name].items() <= config["data"]["init_args"][split_name].items()


def test_the_vqav2_configuration_runs_on_data_in_its_places(made, capsys):
    for split_name, image_split in (("calibration", "train2014"), ("test", "val2014")):
        folder = Path("data/vqav2")
        (folder / image_split).mkdir(parents=True)
        shutil.copy(made / split_name / "questions.json", folder / f"v2_OpenEnded_mscoco_{image_split}_questions.json")
        shutil.copy(made / split_name / "annotations.json", folder / f"v2_mscoco_{image_split}_annotations.json")
        for image in (made / split_name / "images").iterdir():
            shutil.copy(image, folder / image_split / f"COCO_{image_split}_{image.stem}.jpg")
    options = ["--model.model", str(made / "model"), "--data.processor", str(made / "model"), "--data.num_workers", "0"]
    config = ["--config", str(ROOT / "configs/blip2_opt_vqav2.yaml"), "--trainer.accelerator", "cpu"]
    main(["calibrate", *config, *options, "--data.fraction", "1.0", "--output", "policy.json"])
    main(["validate", *config, *options, "--policy", "policy.json", "--compare", "true"])
    assert printed(capsys.readouterr().out)["catp/keep_share"] == 0.5


def test_the_digits_configuration_runs_by_its_name_on_the_shipped_model(monkeypatch, capsys):
    # As in an installed wheel, where configs/ is catp_lightning.configs.
    monkeypatch.setattr(catp_lightning, "__path__", [*catp_lightning.__path__, str(ROOT)])
    main(["scenes", "--questions", "200", "--calibration_questions", "64"])
    main(["test", "--config", "digits_blip2.yaml", "--trainer.accelerator", "cpu"])
    assert printed(capsys.readouterr().out)["test/vqa_accuracy"] > 0.8
    assert len(json.loads(Path("data/digits/calibration/questions.json").read_text())["questions"]) == 64


@pytest.mark.parametrize(
    ("config", "scenes"),
    [
        ("digits_blip2.yaml", "`catp scenes`"),
        ("digits_llava.yaml", "`catp scenes --model digits_llava --output data/digits_llava`"),
    ],
)
def test_a_shipped_configuration_without_its_scenes_names_the_command_that_writes_them(capsys, config, scenes):
    for command, options in (("test", []), ("calibrate", ["--output", "new"]), ("sweep", ["--output", "new"])):
        status, message = fails(capsys, command, "--config", ROOT / "configs" / config, *options)
        assert message.endswith(f"{scenes} writes it.\n")
        assert status == 2


def test_an_unknown_shipped_model_is_refused_with_the_known_names():
    with pytest.raises(DataError, match=r"no shipped model 'letters'; there are: digits_blip2"):
        shipped("letters")
