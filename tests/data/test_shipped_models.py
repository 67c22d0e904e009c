"""The models that come with the package are what their logs say."""

import json
from pathlib import Path

import pytest

from catp_lightning import VQAModule
from catp_lightning.data import GRIDS, PROMPTS, SHIPPED, shipped
from catp_lightning.data.scenes import write_scenes
from catp_lightning.data.vqa import VQADataModule, VQASplit
from tests.support.paths import ROOT
from tests.support.processors import needs_processors_of_qwen
from tests.support.trainers import trainer

every_model = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=needs_processors_of_qwen if name == "digits_qwen2_5_vl" else ()) for name in SHIPPED],
)


@every_model
def test_its_log_says_at_least_90_percent_on_2000_unseen_questions(name: str) -> None:
    log = ROOT / "training" / f"{name.removeprefix('digits_')}.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[0]["seed"] == 0
    assert lines[-1]["test_questions"] == 2000 and lines[-1]["test"]["all"] >= 0.9
    assert name != "digits_blip2" or lines[-1]["seconds"] < 45 * 60


@pytest.mark.slow
@every_model
def test_it_answers_at_least_nine_in_ten_questions_about_digits_it_never_saw(name: str, tmp_path: Path) -> None:
    questions = 48 if name == "digits_qwen2_5_vl" else 120  # of up to 400 visual tokens each, through twelve layers
    split = VQASplit.of_scenes(write_scenes(tmp_path, "test", questions, seed=7, grids=GRIDS[name]))
    data = VQADataModule(str(shipped(name)), test=split, prompt=PROMPTS[name], batch_size=60)
    (figures,) = trainer().test(VQAModule(str(shipped(name))), data, verbose=False)
    assert figures["test/vqa_accuracy"] >= 0.9
