"""The plug-in of lmms-eval, where that is installed: `make test-lmms` runs these tests, its command as a process."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from catp_lightning import PruningPolicy, TokenPruning, VQAModule
from catp_lightning.data import PROMPTS
from catp_lightning.data.vqa import VQADataModule
from catp_lightning.data.vqa_dataset import VQASplit
from catp_lightning.policy.images import decode_images
from tests.support.commands import process
from tests.support.lmms_tasks import FUNCTIONS, PREFIX, Evaluated, lmms_eval, task, with_template, write_data
from tests.support.trainers import trainer

pytest.importorskip("lmms_eval")
pytestmark = pytest.mark.slow

MODELS = ("digits_llava", "digits_qwen2_5_vl", "digits_mllama")
QUESTIONS, CALIBRATION, BATCH = 24, 64, 4
QWEN = {"device_map": "cpu", "min_pixels": 64, "max_pixels": 25600}


@dataclass(frozen=True)
class Made:
    """Models, data and tasks in a folder, a policy calibrated on a task, and what lmms-eval wrote and printed."""

    folder: Path
    calibrated: str
    runs: dict[str, Evaluated]
    printed: str


def arguments(model: Path, **more: object) -> str:
    return ",".join(f"{name}={value}" for name, value in {"pretrained": model, **more}.items())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("lmms")
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "functions.py").write_text(FUNCTIONS)
    for model in MODELS:
        with_template(folder / "models", model)
        write_data(folder / "data" / model, model, QUESTIONS, CALIBRATION)
        (tasks / f"{model}.yaml").write_text(task(model, folder / "data" / model, "test", {"default": ""}))
    llava, qwen, mllama = (folder / "models" / model for model in MODELS)
    data = folder / "data" / qwen.name
    (tasks / "seen.yaml").write_text(task("seen", data, "calibration", {"default": PREFIX, "qwen2_5_vl": ""}))
    done = process(
        *("calibrate", "--lmms_task", qwen.name, "--data.include_path", tasks, "--data.split", "calibration"),
        *("--model.pretrained", qwen, "--model.model_args", json.dumps(QWEN), "--model.device", "cpu"),
        *("--model.batch_size", BATCH, "--scorer", "cdpruner", "--keep", 0.25, "--trainer.accelerator", "cpu"),
        *("--output", folder / "calibrated.json"),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    PruningPolicy("fastervlm", keep=0.1).save(folder / "fastervlm.json")
    PruningPolicy("trimmed-llama", keep=0.1).save(folder / "trimmed.json")
    pruned = arguments(qwen, **QWEN, policy=folder / "calibrated.json")
    runs = {
        "llava": {"model": "llava_hf", "model_args": arguments(llava, device_map="cpu"), "tasks": llava.name},
        "llava pruned": {
            "model": "catp",
            "model_args": arguments(llava, device_map="cpu", policy=folder / "fastervlm.json"),
            "tasks": llava.name,
        },
        "qwen pruned": {"model": "catp", "model_args": pruned, "tasks": qwen.name, "batch_size": BATCH},
        "qwen on seen images": {"model": "catp", "model_args": pruned, "tasks": "seen", "batch_size": BATCH},
        "mllama pruned": {
            "model": "catp",
            "model_args": arguments(mllama, device_map="cpu", policy=folder / "trimmed.json"),
            "tasks": mllama.name,
        },
    }
    return Made(folder, done.stdout + done.stderr, *lmms_eval(folder, tasks, runs))


def predicted(
    made: Made, model: str, policy: str | None, batch_size: int, split: str = "test", dtype: torch.dtype = torch.float32
) -> tuple[list[str], dict[str, float]]:
    """Answers of `trainer.predict` to the questions of a task, in their order, and what TokenPruning found."""
    data = made.folder / "data" / model / split
    place = str(made.folder / "models" / model)
    module = VQAModule(AutoModelForImageTextToText.from_pretrained(place, dtype=dtype), place)
    pruning = None if policy is None else TokenPruning(made.folder / policy)
    questions = VQASplit(str(data / "questions.json"), str(data / "images"), image_name="{image_id:012d}.png")
    loader = VQADataModule(place, test=questions, prompt=PROMPTS[model], batch_size=batch_size)
    batches = trainer(*([] if pruning is None else [pruning])).predict(module, datamodule=loader)
    answers = [one["answer"] for batch in batches or [] for one in batch]
    return answers, {} if pruning is None else pruning.figures


def test_the_unpruned_model_answers_as_in_predict(made: Made) -> None:
    answers, _ = predicted(made, "digits_llava", None, 1)
    assert len(answers) == QUESTIONS
    assert made.runs["llava"].answers == answers


@pytest.mark.parametrize(
    ("run", "model", "policy", "batch_size", "dtype"),
    [
        ("llava pruned", "digits_llava", "fastervlm.json", 1, torch.float32),
        ("qwen pruned", "digits_qwen2_5_vl", "calibrated.json", BATCH, torch.bfloat16),
        ("mllama pruned", "digits_mllama", "trimmed.json", 1, torch.float32),
    ],
)
def test_pruned_models_answer_each_question_as_in_predict(
    made: Made, run: str, model: str, policy: str, batch_size: int, dtype: torch.dtype
) -> None:
    answers, figures = predicted(made, model, policy, batch_size, dtype=dtype)
    assert made.runs[run].answers == answers
    found = made.runs[run].results["throughput"]
    for name in ("catp/tokens_kept", "catp/keep_share"):
        assert found[f"avg_{name}"] == pytest.approx(figures[name], rel=1e-6)
    assert found["avg_catp/seconds_prefill"] > 0


def test_pruning_changes_answers_and_the_results_name_model_and_policy(made: Made) -> None:
    plain, pruned = made.runs["llava"], made.runs["llava pruned"]
    assert plain.answers != pruned.answers
    digest = PruningPolicy.load(made.folder / "fastervlm.json").digest
    backend = plain.results["config"]["model_backend"]
    assert backend == "lmms_eval.models.chat.llava_hf.LlavaHf (chat)"
    assert pruned.results["config"]["model_backend"] == backend.replace(" (", f" pruned by policy {digest} (")
    assert "avg_catp/tokens_kept" not in plain.results["throughput"]
    simple = made.runs["mllama pruned"].results["config"]["model_backend"]
    assert simple.startswith("lmms_eval.models.simple.llama_vision.LlamaVision pruned by policy")


def test_calibration_reads_the_split_without_images_that_are_evaluated(made: Made) -> None:
    said = re.search(
        r"(\d+) questions of the split 'calibration' of digits_qwen2_5_vl; (\d+) left out", made.calibrated
    )
    assert said is not None, made.calibrated
    assert (int(said[1]), int(said[2])) == (CALIBRATION, 1)
    evidence = PruningPolicy.load(made.folder / "calibrated.json").evidence
    assert decode_images(evidence["images"])[1] == CALIBRATION // 2  # two questions an image
    assert made.runs["qwen pruned"].results["throughput"]["avg_catp/calibration_images"] == 0


def test_images_of_the_calibration_are_counted_and_warned_of(made: Made) -> None:
    found = made.runs["qwen on seen images"].results["throughput"]
    assert found["avg_catp/calibration_images"] == CALIBRATION // 2
    assert f"This split contains {CALIBRATION // 2} of the {CALIBRATION // 2} images" in made.printed


def test_tasks_ask_as_they_ask_the_model_that_is_wrapped(made: Made) -> None:
    answers, _ = predicted(made, "digits_qwen2_5_vl", "calibrated.json", BATCH, "calibration", torch.bfloat16)
    assert made.runs["qwen on seen images"].answers == answers
