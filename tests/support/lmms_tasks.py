"""Tasks of lmms-eval over digit scenes, shipped models with the chat template that it asks for, and its command."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from catp_lightning.data import GRIDS, PROMPTS, shipped
from catp_lightning.data.scenes import Split, write_scenes
from tests.support.processes import environment

SPLITS = ("calibration", "test")

PREFIX = "Say: "
"""What the tasks put before a question, but for models of the names that they have texts for."""

FUNCTIONS = '''\
"""What the task's YAML file names."""

from PIL import Image


def doc_to_visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs):
    return lmms_eval_specific_kwargs["before"] + doc["question"]
'''


def task(name: str, folder: Path, test_split: str, texts: Mapping[str, str]) -> str:
    """The YAML of a task; `texts` are put before questions, by the name of the lmms-eval model."""
    files = {split: str(folder / split / "records.jsonl") for split in SPLITS}
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": test_split,
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"max_new_tokens": 10, "temperature": 0, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "lmms_eval_specific_kwargs": {name: {"before": text} for name, text in texts.items()},
    }
    own = "".join(f"{name}: !function functions.{name}\n" for name in ("doc_to_visual", "doc_to_text"))
    return yaml.safe_dump(config) + own


def write_split(folder: Path, split: Split, questions: int, grids: Sequence[tuple[int, int]]) -> None:
    """Write scenes with questions, and the same as records of a task."""
    write_scenes(folder, split, questions, grids=grids)
    asked, annotated = (json.loads((folder / f"{name}.json").read_text()) for name in ("questions", "annotations"))
    answers = {one["question_id"]: one["multiple_choice_answer"] for one in annotated["annotations"]}
    write_records(folder, [{**one, "answer": answers[one["question_id"]]} for one in asked["questions"]])


def write_records(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write questions for both sides, sorted by text, in which order lmms-eval makes its batches."""
    records = sorted(records, key=lambda one: one["question"])
    (folder / "questions.json").write_text(json.dumps({"questions": records}))
    images = [{**one, "image": str(folder / "images" / image_name(one))} for one in records]
    (folder / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in images))


def image_name(record: Mapping[str, Any]) -> str:
    return f"{record['image_id']:012d}.png"


def write_data(folder: Path, model: str, questions: int, calibration: int) -> None:
    """Write `test/` and `calibration/`, where one question more is about an image of `test/`.

    Qwen's scenes are of a size at which lmms-eval leaves images as they are.
    """
    grids = ((7, 7),) if "qwen" in model else GRIDS[model]
    write_split(folder / "test", "test", questions, grids)
    write_split(folder / "calibration", "calibration", calibration, grids)
    records = {name: json.loads((folder / name / "questions.json").read_text())["questions"] for name in SPLITS}
    both = records["test"][0]
    shutil.copy(folder / "test" / "images" / image_name(both), folder / "calibration" / "images")
    write_records(folder / "calibration", [*records["calibration"], both])


def with_template(folder: Path, model: str) -> Path:
    """Copy a shipped model with a chat template that writes the prompt that it was trained with."""
    copy = folder / model
    shutil.copytree(shipped(model), copy)
    before, after = PROMPTS[model].split("{}")
    if model == "digits_mllama":  # the processor and its tokenizer each begin a text; lmms-eval lets neither do it
        before = before.replace("<|image|>", "<|begin_of_text|><|image|><|begin_of_text|>")
    text = "{% for part in messages[-1]['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    (copy / "chat_template.jinja").write_text(f"{{{{ {before!r} }}}}{text}{{{{ {after!r} }}}}")
    return copy


@dataclass(frozen=True)
class Evaluated:
    """What one run of lmms-eval wrote: results, and answers in the order of the task's records."""

    results: dict[str, Any]
    answers: list[str]


def lmms_eval(folder: Path, tasks: Path, runs: Mapping[str, Mapping[str, object]]) -> tuple[dict[str, Evaluated], str]:
    """Run the command `lmms-eval` in a process of its own, with a configuration of several runs.

    Returns:
        What each run wrote, and all that it printed.
    """
    shared = {"device": "cpu", "include_path": str(tasks), "log_samples": True, "verbosity": "DEBUG"}
    config = [{**shared, "output_path": str(folder / "lmms" / name), **run} for name, run in runs.items()]
    (folder / "runs.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lmms-eval")), "--config", str(folder / "runs.yaml")],
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
        env=environment(HF_HOME=str(folder / "hf"), HF_HUB_OFFLINE="1"),
        cwd=folder,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return {name: _written(folder / "lmms" / name) for name in runs}, done.stdout + done.stderr


def _written(folder: Path) -> Evaluated:
    (results,) = folder.rglob("*_results.json")
    (samples,) = folder.rglob("*_samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    answers = {line["doc_id"]: line["filtered_resps"].strip() for line in lines}
    assert len(answers) == len(lines)  # no question twice
    return Evaluated(json.loads(results.read_text()), [answers[number] for number in range(len(answers))])
