"""AnswerWriter: answers are a file of one line each, whole whatever happens."""

import json
import os
import signal
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from catp_lightning.callbacks.answer_writer import AnswerWriter, merge_answers
from catp_lightning.data.vqa import VQADataModule
from catp_lightning.modules.vqa import VQAModule
from tests.support.answer_files import Returning, lines, named, write_answers
from tests.support.processes import in_fork
from tests.support.tiny_vqa import opt_config, save_model, scenes
from tests.support.trainers import trainer


def test_answers_of_a_real_model_are_written_in_the_result_layout(tmp_path):
    folder = save_model(tmp_path / "model", opt_config())
    data = VQADataModule(folder, val=scenes(tmp_path / "scenes", 7), batch_size=3)
    path = tmp_path / "new folder" / "answers.jsonl"
    returned = trainer(AnswerWriter(str(path))).predict(VQAModule(folder), data)
    asked = json.loads((tmp_path / "scenes" / "questions.json").read_text())["questions"]
    assert lines(path) == list(chain(*returned))
    assert [line["question_id"] for line in lines(path)] == [question["question_id"] for question in asked]
    assert [set(line) for line in lines(path)] == [{"question_id", "answer"}] * 7


def test_answers_are_written_where_predictions_are_not_returned(tmp_path):
    assert write_answers(tmp_path / "answers.jsonl") is None
    assert lines(tmp_path / "answers.jsonl") == named([0, 1, 2, 3, 4])
    assert "número 4" in (tmp_path / "answers.jsonl").read_text(encoding="utf-8")


def test_a_second_run_replaces_the_first(tmp_path):
    run = trainer(AnswerWriter(str(tmp_path / "answers.jsonl")), devices=1)
    for questions in (5, 3):
        run.predict(Returning(named), DataLoader(torch.arange(questions), batch_size=2))
    assert lines(tmp_path / "answers.jsonl") == named([0, 1, 2])


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
def test_an_own_module_is_told_at_its_first_batch_what_its_step_must_return(tmp_path, make, message):
    calls = []
    with pytest.raises(TypeError, match=r"Returning\.predict_step to return a list of") as caught:
        write_answers(tmp_path / "answers.jsonl", lambda ids: calls.append(ids) or make(ids))
    assert message in str(caught.value)
    assert calls == [[0, 1]]
    assert not list(tmp_path.iterdir())


def test_a_folder_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"):
        write_answers(tmp_path, make=None)


@pytest.mark.parametrize(
    "answer",
    [
        "\ud83d",
        "a\udc00b",
        "x\u2028y\u2029z",
        "\x85\x9b2J\x1b[2J\x7f\x00\x0b\x0c\x1c\x1d\x1e\r\n",
        '"\\"',
        "é 雪 😀 \u200b",
    ],
)
def test_an_answer_of_any_characters_is_one_line_that_reads_back_the_same(tmp_path: Path, answer: str) -> None:
    write_answers(
        tmp_path / "answers.jsonl", lambda ids: [{"question_id": n, "answer": answer} for n in ids], questions=3
    )
    text = (tmp_path / "answers.jsonl").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 3 == text.count("\n")
    assert all(char == "\n" or (char >= " " and not "\x7f" <= char <= "\x9f") for char in text)
    assert lines(tmp_path / "answers.jsonl") == [{"question_id": n, "answer": answer} for n in range(3)]


def dying(ids: list[int]) -> list[dict]:
    if 4 in ids:
        os.kill(os.getpid(), signal.SIGKILL)
    return named(ids)


def test_a_killed_run_leaves_its_answers_which_the_next_keeps_until_its_end(tmp_path: Path) -> None:
    path, left, kept = (tmp_path / f"answers{end}" for end in (".jsonl", ".rank0.jsonl", ".rank0.jsonl.before"))
    path.write_text("old\n")
    (ended,) = in_fork(lambda: write_answers(path, dying))
    assert ended.code == -signal.SIGKILL and path.read_text() == "old\n"
    merge_answers([left], tmp_path / "some.jsonl")
    assert lines(tmp_path / "some.jsonl") == named([0, 1, 2, 3])
    whole = left.read_bytes()
    left.write_bytes(whole + b'{"order": [0, 4, 0, 0], "question')  # killed in the middle of a line
    merge_answers([left], tmp_path / "some.jsonl")
    assert lines(tmp_path / "some.jsonl") == named([0, 1, 2, 3])
    left.write_bytes(whole)
    with pytest.raises(RuntimeError, match="planted"):
        write_answers(path, lambda ids: _raise() if 2 in ids else named(ids))
    assert kept.read_bytes() == whole and len(left.read_bytes().splitlines()) == 2
    with pytest.raises(RuntimeError, match="planted"):
        write_answers(path, lambda ids: _raise())
    assert path.read_text() == "old\n"
    assert kept.read_bytes() == whole, "the run that came furthest is kept"
    write_answers(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["answers.jsonl", "some.jsonl"]
    assert lines(path) == named([0, 1, 2, 3, 4])


def _raise() -> list[dict]:
    raise RuntimeError("planted")


def test_a_second_run_is_refused_while_one_writes_to_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"

    def second(ids: list[int]) -> list[dict]:
        if 2 in ids:
            with pytest.raises(BlockingIOError, match=rf"has not ended .*: process {os.getpid()} on .*another path"):
                write_answers(path)
        return named(ids)

    write_answers(path, second)
    assert [file.name for file in tmp_path.iterdir()] == ["answers.jsonl"]
    assert lines(path) == named([0, 1, 2, 3, 4])
