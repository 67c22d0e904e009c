import json
from itertools import chain
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from catp_lightning.callbacks.answer_writer import AnswerWriter
from catp_lightning.data.vqa import VQADataModule
from catp_lightning.errors import DataError
from catp_lightning.vqa_module import VQAModule
from tests.tiny_vqa import opt_config, save_model, scenes


class Returning(LightningModule):
    """Answers with what it is given, or with what `make` makes of a question id."""

    def __init__(self, make) -> None:
        super().__init__()
        self.make = make

    def predict_step(self, batch, batch_idx):
        return self.make(batch.tolist())


def named(ids: list[int]) -> list[dict]:
    return [{"question_id": number, "answer": f"número {number}"} for number in ids]


def run(path: Path, make=named, questions: int = 5, **options) -> list | None:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(accelerator="cpu", callbacks=[AnswerWriter(str(path))], **quiet, **{"devices": 1, **options})
    return trainer.predict(Returning(make), DataLoader(torch.arange(questions), batch_size=2), return_predictions=False)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_of_a_real_model_are_written_in_the_result_layout(tmp_path):
    folder = save_model(tmp_path / "model", opt_config())
    data = VQADataModule(folder, val=scenes(tmp_path / "scenes", 7), batch_size=3)
    path = tmp_path / "new folder" / "answers.jsonl"
    trainer = Trainer(
        accelerator="cpu", callbacks=[AnswerWriter(str(path))], logger=False, enable_progress_bar=False,
        enable_checkpointing=False,
    )  # fmt: skip
    returned = trainer.predict(VQAModule(folder), data)
    asked = json.loads((tmp_path / "scenes" / "questions.json").read_text())["questions"]
    assert lines(path) == list(chain(*returned))
    assert [line["question_id"] for line in lines(path)] == [question["question_id"] for question in asked]
    assert [set(line) for line in lines(path)] == [{"question_id", "answer"}] * 7


def test_answers_are_written_where_predictions_are_not_returned(tmp_path):
    assert run(tmp_path / "answers.jsonl") is None
    assert lines(tmp_path / "answers.jsonl") == named([0, 1, 2, 3, 4])
    assert "número 4" in (tmp_path / "answers.jsonl").read_text(encoding="utf-8")


def test_a_second_run_replaces_the_first(tmp_path):
    writer = AnswerWriter(str(tmp_path / "answers.jsonl"))
    trainer = Trainer(accelerator="cpu", callbacks=[writer], logger=False, enable_progress_bar=False, devices=1)
    for questions in (5, 3):
        trainer.predict(Returning(named), DataLoader(torch.arange(questions), batch_size=2))
    assert lines(tmp_path / "answers.jsonl") == named([0, 1, 2])


def test_a_run_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    folder = save_model(tmp_path / "model", opt_config())
    split = scenes(tmp_path / "scenes", 6)
    sorted(Path(split.images).iterdir())[-1].write_bytes(b"damaged")
    results = tmp_path / "results"
    results.mkdir()
    (results / "answers.jsonl").write_text("old\n")
    writer = AnswerWriter(str(results / "answers.jsonl"))
    trainer = Trainer(accelerator="cpu", callbacks=[writer], logger=False, enable_progress_bar=False, devices=1)
    with pytest.raises(DataError, match="cannot be read"):
        trainer.predict(VQAModule(folder), VQADataModule(folder, val=split, batch_size=2))
    assert [file.name for file in results.iterdir()] == ["answers.jsonl"]
    assert (results / "answers.jsonl").read_text() == "old\n"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.tensor, "but it returned Tensor"),
        (lambda ids: {"question_id": ids, "answer": ids}, "but it returned dict"),
        (lambda ids: ["yes" for _ in ids], "one of them is 'yes'"),
        (lambda ids: [{"answer": "yes"} for _ in ids], "one of them is {'answer': 'yes'}"),
        (lambda ids: [{"question_id": "1", "answer": "yes"}], "one of them is {'question_id': '1'"),
        (lambda ids: [{"question_id": True, "answer": "yes"}], "one of them is {'question_id': True"),
        (lambda ids: [{"question_id": 1, "answer": 3}], "one of them is {'question_id': 1, 'answer': 3}"),
    ],
)
def test_other_predictions_are_refused_at_the_first_batch(tmp_path, make, message):
    calls = []
    with pytest.raises(TypeError, match=r"Returning\.predict_step to return a list of") as caught:
        run(tmp_path / "answers.jsonl", lambda ids: calls.append(ids) or make(ids))
    assert message in str(caught.value)
    assert calls == [[0, 1]]
    assert not list(tmp_path.iterdir())


def test_a_folder_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"):
        run(tmp_path, make=None)


def test_two_processes_write_a_file_each_and_no_question_twice(tmp_path):
    run(tmp_path / "answers.jsonl", strategy="ddp_fork", devices=2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["answers.rank0.jsonl", "answers.rank1.jsonl"]
    first, second = lines(tmp_path / "answers.rank0.jsonl"), lines(tmp_path / "answers.rank1.jsonl")
    assert first
    assert second
    assert sorted(line["question_id"] for line in first + second) == [0, 1, 2, 3, 4]
