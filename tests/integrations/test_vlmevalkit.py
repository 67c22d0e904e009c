"""VLMEvalKit with pruned models, in an environment where that is installed: its `run.py`, as a process."""

import base64
import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from catp_lightning import PruningPolicy, TokenPruning, VQAModule
from catp_lightning.data import PROMPTS, shipped
from catp_lightning.data.vqa import VQADataModule
from catp_lightning.data.vqa_dataset import VQASplit
from tests.support.lmms_tasks import write_data
from tests.support.paths import ROOT
from tests.support.trainers import trainer

pytest.importorskip("vlmeval")
pytestmark = pytest.mark.slow

MODEL, QUESTIONS = "digits_llava", 12

PROGRAM = '''\
"""VLMEvalKit's registry with models of its interface that need no GPU, then the command."""

import sys
from functools import partial

import transformers
from PIL import Image
from vlmeval.config import supported_VLM
from vlmeval.vlm.base import BaseModel

from catp_lightning.integrations.vlmevalkit.__main__ import main


class Digits(BaseModel):
    INTERLEAVE = False

    def __init__(self, model_path, prompt, attribute="model"):
        super().__init__()
        setattr(self, attribute, transformers.AutoModelForImageTextToText.from_pretrained(model_path).eval())
        self.processor = transformers.AutoProcessor.from_pretrained(model_path)
        self.prompt = prompt

    def generate_inner(self, message, dataset=None):
        text, image = self.message_to_promptimg(message, dataset=dataset)
        inputs = self.processor(
            images=Image.open(image).convert("RGB"), text=self.prompt.replace("{}", text), return_tensors="pt"
        )
        found = self.model.generate(**inputs, max_new_tokens=10, do_sample=False)
        return self.processor.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


supported_VLM["digits"] = partial(Digits, model_path=sys.argv[1], prompt=sys.argv[2])
supported_VLM["elsewhere"] = partial(Digits, model_path=sys.argv[1], prompt=sys.argv[2], attribute="network")
sys.exit(main(sys.argv[3:]))
'''


@dataclass(frozen=True)
class Ran:
    """Exit code of a run, and what it printed."""

    code: int
    printed: str


def run(folder: Path, *arguments: object) -> Ran:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    command = [
        sys.executable,
        program,
        shipped(MODEL),
        PROMPTS[MODEL],
        *arguments,
        "--data",
        "Digits",
        "--mode",
        "infer",
    ]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    set_to = {**os.environ, "LMUData": str(folder / "lmu"), "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*map(str, command)], cwd=folder, env=set_to, capture_output=True, text=True, check=False)
    return Ran(done.returncode, done.stdout + done.stderr)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlmevalkit")
    write_data(folder / "data", MODEL, QUESTIONS, 1)
    questions = json.loads((folder / "data/test/questions.json").read_text())["questions"]
    (folder / "lmu").mkdir()
    with (folder / "lmu/Digits.tsv").open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["index", "image", "question"])
        for question in questions:
            image = (folder / "data/test/images" / f"{question['image_id']:012d}.png").read_bytes()
            rows.writerow([question["question_id"], base64.b64encode(image).decode(), question["question"]])
    PruningPolicy("fastervlm", keep=0.1).save(folder / "fastervlm.json")
    return folder


def predicted(data: Path, policy: Path) -> tuple[dict[int, str], dict[str, float]]:
    """Answers of `trainer.predict` by question, and what TokenPruning found, on the JPEGs that VLMEvalKit wrote."""
    pruning = TokenPruning(policy)
    asked = json.loads((data / "data/test/questions.json").read_text())["questions"]
    questions = data / "questions.json"
    questions.write_text(json.dumps({"questions": [{**one, "image_id": one["question_id"]} for one in asked]}))
    split = VQASplit(str(questions), str(data / "lmu/images/Digits"), image_name="{image_id}.jpg")
    loader = VQADataModule(str(shipped(MODEL)), test=split, prompt=PROMPTS[MODEL], batch_size=1)
    batches = trainer(pruning).predict(VQAModule(str(shipped(MODEL))), datamodule=loader)
    return {one["question_id"]: one["answer"] for batch in batches or [] for one in batch}, pruning.figures


@pytest.mark.parametrize("keep", [0.1, 1.0])
def test_models_of_its_registry_answer_as_in_predict(data: Path, keep: float) -> None:
    import pandas

    policy = data / f"keep-{keep}.json"
    PruningPolicy("fastervlm", keep=keep).save(policy)
    found = run(data, "--policy", policy, "--keep", keep, "--model", "digits", "--work-dir", f"out{keep}")
    assert found.code == 0, found.printed[-3000:]
    digest = PruningPolicy.load(policy).digest[:12]
    folder = data / f"out{keep}" / f"digits-catp-{digest}"
    (sheet,) = folder.rglob(f"digits-catp-{digest}_Digits.xlsx")
    table = pandas.read_excel(sheet, dtype={"prediction": str})
    answers, figures = predicted(data, policy)
    assert dict(zip(table["index"].tolist(), table["prediction"].tolist(), strict=True)) == answers
    assert len(answers) == QUESTIONS
    told = json.loads((folder / "catp.json").read_text())
    for name in ("catp/tokens_kept", "catp/keep_share"):
        assert told[name] == pytest.approx(figures[name], rel=1e-6)
    assert told["catp/seconds_prefill"] > 0


@pytest.mark.parametrize(
    ("model", "policy", "message"),
    [
        ("digit", "fastervlm.json", "VLMEvalKit has no model 'digit'. Did you mean 'digits'?"),
        ("GPT4o", "fastervlm.json", "VLMEvalKit's 'GPT4o' is answered elsewhere, by an API"),
        ("elsewhere", "fastervlm.json", "holds no model of transformers as `model`, so there is nothing to prune"),
        ("digits", "catp.json", "catp"),
    ],
)
def test_what_cannot_be_pruned_ends_in_a_message(data: Path, model: str, policy: str, message: str) -> None:
    PruningPolicy("catp", keep=0.5).save(data / "catp.json")  # which LLaVA cannot be pruned by
    found = run(data, "--policy", data / policy, "--model", model, "--work-dir", f"refused-{model}-{policy}")
    assert found.code == 1
    assert message in found.printed
    assert not list(data.glob(f"refused-{model}-{policy}/*/catp.json"))
