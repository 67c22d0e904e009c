"""What a command cannot do it says in one message, and leaves every file as it was."""

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from jsonargparse import ArgumentError

from catp_lightning.errors import PolicyError
from catp_lightning.modules.vqa import VQAModule
from catp_lightning.policy import PruningPolicy
from tests.support.commands import BLIP2, catp, fails, process, split
from tests.support.tiny_vqa import QUERIES


def test_a_policy_for_another_architecture_is_refused_by_both_names(made, capsys):
    PruningPolicy("catp", model=BLIP2).save("policy.json")
    status, message = fails(capsys, "validate", "--config", made / "tiny.yaml", "--policy", "policy.json")
    assert status == 2
    assert "made for blip-2 with 32 visual tokens" in message
    assert f"this model is blip-2 with {QUERIES} visual tokens" in message


@pytest.mark.slow
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


WRONG = [
    (["validate", "--keep", "0.5"], 2, "give --policy or --scorer"),
    (["test", "--policy", "policies"], 2, "several budgets (1, 2)"),
    (["test", "--policy", "nowhere"], 2, "no policy at 'nowhere'"),
    (["test", "--policy", "torn.json", "--model.model", "no/model"], 2, "torn.json cannot be read as a policy"),
    (["calibrate", "--budget", "{flops: 0.5}"], 2, "budget is in 'flops'"),
    (["test", "--scorer", "strid"], 2, "Did you mean 'stride'?"),
    (["test", "--scorer", "fastervlm"], 2, "does not show"),
    (["test", "--polcy", "policies"], 2, "Did you mean --policy?"),
    (["test", "--model.model", "/nowhere/model"], 2, "no model in /nowhere/model"),
    (["validate", "--data.val.questions", "no.json"], 2, "no.json: there is no such file"),
    (["show", "--scorer", "l2-norm", "--data.test.images", "nowhere"], 2, "nowhere: there is no such folder"),
    (["predict"], 2, "give --output"),
    (["calibrate", "--max_disagreement", "0.001"], 1, "takes at least 2995 there"),
    (["calibrate", "--max_disagreement", "0.5", "--group_by", "kinds"], 1, "group_by is 'kinds', and a batch"),
    (["forecast"], 2, "no command 'forecast'"),
]
ALSO_WRONG = [  # told by what tells one of the others, or where policies and settings are tested
    (["test", "--policy", "policies", "--scorer", "stride"], 2, "give one of them"),
    (["test", "--budget", "{tokens: 0.5}"], 2, "give it as --policy"),
    (["calibrate", "--lmms_task"], 2, "needs the name of a task"),
    (["test", "--scorer", "stride", "--scorer_args", "{layer: 2}"], 2, "no argument 'layer'"),
    (["predict", "--output", "file/answers.jsonl"], 2, "is not a folder"),
    (["calibrate", "--output", "taken.json"], 2, "taken-report is a file"),
    (["calibrate", "--max_disagreement", "2"], 2, "For 2 percent write 0.02"),
    (["test", "--data.test", "null"], 2, "test"),
    (["predict", "--trainer.accelerator", "abacus", "--output", "new.jsonl"], 2, "abacus"),
    (["test", "--policy", "policies", "--keep", "3"], 2, "keep=3; it has 1, 2"),
    (["test", "--policy", "policies", "--keep", "half"], 2, "keep is 'half'"),
    (["test", "--policy", "policies", "--budget", "{tokens: 0.5}"], 2, "none says what it costs"),
    (["calibrate", "--budget", "{tokens: [0.5, 0.25]}", "--output", "policy.json"], 2, "give a folder"),
    (["calibrate", "--budget", "{tokens: 0.5}", "--keep", "0.5"], 2, "one calibration has one of them"),
    (["calibrate", "--lmms-task="], 2, "needs the name of a task"),
    (["test", "--scorer", "stride", "--selector", "best"], 2, "no selector 'best'"),
    (["test", "--scorer_args", "{layer: 2}"], 2, "--scorer: give it as well"),
    (["predict", "--output", "new.jsonl", "--selector", "dpp"], 2, "--scorer: give it as well"),
    (["test", "--config", "nowhere.yaml"], 2, "nowhere.yaml"),
    (["calibrate", "--data.calibration.questions", "no.json"], 2, "no.json: there is no such file"),
    (["test", "--data.fraction", "2"], 2, "fraction must be in (0, 1], got 2.0"),
    (["test", "--ckpt_path", "nowhere.ckpt"], 2, "nowhere.ckpt"),
    (["predict", "--output", "policies"], 2, "policies is a folder"),
    (["calibrate", "--keep", "0"], 2, "keep is 0"),
    (["calibrate", "--keep", "2.0"], 2, "keep=2, without the point"),
    (["calibrate", "--keep", "[0.5, 1]", "--output", "policy.json"], 2, "give a folder"),
    (["calibrate", "--output", "file"], 2, "file is a file"),
    (["calibrate", "--max_disagreement", "few"], 2, "max_disagreement"),
    (["calibrate", "--max_disagreement", "0.02", "--confidence", "1"], 2, "confidence is 1"),
    (["calibrate", "--confidence", "0.9"], 2, "give --max_disagreement"),
    (["calibrate", "--group_by", "answer_types"], 2, "Give max_disagreement, or leave them out"),
    (["calibrate", "--max_disagreement", "0.5", "--over", "answers"], 2, "over"),
    (["calibrat"], 2, "Did you mean 'calibrate'?"),
]


@pytest.mark.parametrize(
    ("args", "status", "said"), [*WRONG, *(pytest.param(*row, marks=pytest.mark.slow) for row in ALSO_WRONG)]
)
def test_what_cannot_be_done_is_said_in_one_message(made, capsys, args, status, said):
    for keep in (1, 2):
        PruningPolicy("stride", keep=keep).save(f"policies/keep-{keep}.json")
    for name, content in {"file": "", "taken-report": "", "torn.json": '{"scorer": "ca'}.items():
        Path(name).write_text(content)
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
        (["scenes", "--model", "digits"], "no shipped model 'digits'; there are: digits_blip2"),
        (["scenes", "--output", "file"], "--output file is a file"),
        (["scenes", "--shift", "details"], "known are noisy, moved"),
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


@pytest.mark.slow
def test_a_corrupt_image_read_by_a_worker_process_is_one_message(made, tmp_path, capsys):
    shutil.copytree(made / "test", "scenes")
    first = min(Path("scenes/images").iterdir())
    first.write_bytes(b"not an image")
    place = ["--data.num_workers", 1, "--data.test", json.dumps(split(tmp_path / "scenes"))]
    status, message = fails(capsys, "predict", "--config", made / "tiny.yaml", *place, "--output", "answers.jsonl")
    assert status == 1
    assert message.startswith(f"{tmp_path / 'scenes/images' / first.name}, the image of question")
    assert message.endswith("leave its questions out of the questions file.\n")


def test_a_process_of_its_own_that_fails_ends_with_its_status_and_the_message():
    done = process("scenes", "--qestions", "4", "--output", "new")
    said = r"^\ncatp: error: .* Did you mean --questions\?\n`catp scenes --help` lists the options\.\n$"
    assert done.returncode == 2
    assert re.search(said, done.stderr)
    assert not Path("new").exists()


@pytest.mark.skipif(find_spec("lmms_eval") is not None, reason="lmms-eval is installed: tests/integrations run it")
@pytest.mark.parametrize("option", [["--lmms_task", "pope"], ["--lmms-task=pope"]])
def test_a_task_of_lmms_eval_needs_lmms_eval(option, capsys):
    status, message = fails(capsys, "calibrate", *option)
    assert status == 2
    assert "pip install 'catp-lightning[lmms]'" in message
