"""Evaluation data sets are named in a configuration, a reader for each split."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from catp_lightning.data.benchmarks import GQA
from catp_lightning.policy import PruningPolicy
from tests.support.benchmark_files import pope
from tests.support.benchmark_tasks import mme
from tests.support.benchmark_writing import write_images, write_json
from tests.support.commands import answers, catp, fails, printed

READERS = "catp_lightning.data.benchmarks"


def many_images(folder: Path) -> GQA:
    """A question of GQA about each of 40 images."""
    names = [f"n{number}" for number in range(40)]
    asked = {str(n): {"imageId": name, "question": "which digit?", "answer": "2"} for n, name in enumerate(names)}
    images = write_images(folder / "images", [f"{name}.jpg" for name in names], first=1000)
    return GQA(write_json(folder / "train_balanced_questions.json", asked), images)


@pytest.fixture
def configured(made: Path, tmp_path: Path) -> Path:
    """A folder with a configuration that calibrates on GQA, validates on MME and tests on POPE."""
    readers = {
        "calibration": ("GQA", many_images(tmp_path / "gqa"), ("questions", "images")),
        "val": ("MME", mme(tmp_path / "mme"), ("folder",)),
        "test": ("POPE", pope(tmp_path / "pope"), ("questions", "images")),
    }
    splits: dict[str, Any] = {
        split: {"class_path": f"{READERS}.{name}", "init_args": {field: getattr(reader, field) for field in fields}}
        for split, (name, reader, fields) in readers.items()
    }
    config = yaml.safe_load((made / "tiny.yaml").read_text())
    common = {key: config["data"][key] for key in ("processor", "batch_size")}
    config["data"] = {"class_path": f"{READERS}.BenchmarkDataModule", "init_args": {**common, **splits}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.mark.slow
def test_a_policy_is_calibrated_on_one_data_set_and_tested_on_others(
    configured: Path, capsys: pytest.CaptureFixture[str], no_report: None
) -> None:
    catp(configured, "calibrate", "--scorer", "stride", "--keep", "0.5", "--output", "policies")
    assert sum(PruningPolicy.load("policies/policy.json").evidence["samples"].values()) == 40
    catp(configured, "test", "--policy", "policies")
    figures = printed(capsys.readouterr().out)
    assert {name for name in figures if name.startswith("test/")} == {
        f"test/pope_{figure}" for figure in ("accuracy", "precision", "recall", "f1", "yes_ratio")
    }
    assert figures["catp/tokens_kept"] == 2
    catp(configured, "validate", "--policy", "policies")
    assert "val/mme_existence_accuracy_plus" in printed(capsys.readouterr().out)
    catp(configured, "predict", "--policy", "policies", "--output", "answers.jsonl")
    assert list(answers("answers.jsonl")) == [1, 2, 3, 4, 5, 6]


def test_what_is_wrong_with_a_data_set_ends_the_command_with_a_sentence(
    configured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("pope/coco_pope_random.json").write_text('{"question_id": 1}\n')
    status, message = fails(capsys, "test", "--config", "tiny.yaml")
    assert status == 2 and "coco_pope_random.json, line 1 is not in POPE's layout: 'image' must be str" in message


def test_an_argument_that_a_reader_does_not_have_is_refused(
    configured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((configured / "tiny.yaml").read_text())
    config["data"]["init_args"]["test"]["init_args"]["split"] = "val"
    (configured / "tiny.yaml").write_text(yaml.safe_dump(config))
    status, message = fails(capsys, "test", "--config", "tiny.yaml")
    assert status == 2 and "split" in message
