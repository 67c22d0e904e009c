import json
import os
import signal
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, DistributedSampler

from catp_lightning.callbacks.answer_writer import AnswerWriter, merge_answers
from catp_lightning.data.vqa import VQADataModule
from catp_lightning.errors import DataError
from catp_lightning.modules.vqa import VQAModule
from tests.support.answer_files import Returning, lines, named, write_answers
from tests.support.processes import Ended, in_fork, two_nodes
from tests.support.tiny_vqa import opt_config, save_model, scenes
from tests.support.trainers import Stream, loading, trainer


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


def asked(split) -> list[int]:
    return [question["question_id"] for question in json.loads(Path(split.questions).read_text())["questions"]]


def test_answers_are_written_where_predictions_are_not_returned(tmp_path):
    assert write_answers(tmp_path / "answers.jsonl") is None
    assert lines(tmp_path / "answers.jsonl") == named([0, 1, 2, 3, 4])
    assert "número 4" in (tmp_path / "answers.jsonl").read_text(encoding="utf-8")


def test_a_second_run_replaces_the_first(tmp_path):
    writer = AnswerWriter(str(tmp_path / "answers.jsonl"))
    trainer = Trainer(accelerator="cpu", callbacks=[writer], logger=False, enable_progress_bar=False, devices=1)
    for questions in (5, 3):
        trainer.predict(Returning(named), DataLoader(torch.arange(questions), batch_size=2))
    assert lines(tmp_path / "answers.jsonl") == named([0, 1, 2])


def test_a_run_that_fails_leaves_the_old_file_and_its_answers_up_to_then(tmp_path):
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
    assert sorted(file.name for file in results.iterdir()) == ["answers.jsonl", "answers.rank0.jsonl"]
    assert (results / "answers.jsonl").read_text() == "old\n"
    merge_answers([results / "answers.rank0.jsonl"], results / "some.jsonl")
    assert [line["question_id"] for line in lines(results / "some.jsonl")] == asked(split)[:4]


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
    (ended,) = in_fork(lambda: write_answers(path, dying))
    assert ended.code == -signal.SIGKILL and not path.exists()
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


class Several(Returning):
    """The same in several processes, with loaders made in each of them."""

    def __init__(self, loaders: Callable[[int], Any], make: Callable[[list[int]], Any] = named) -> None:
        super().__init__(make)
        self.loaders = loaders

    def predict_dataloader(self) -> Any:
        return self.loaders(self.trainer.global_rank)

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return super().predict_step(batch, batch_idx)


def predict(module: Returning, path: Path, processes: int, **options: Any) -> None:
    strategy = {"strategy": "ddp_fork"} if processes > 1 else {}
    run = trainer(AnswerWriter(str(path)), devices=processes, **strategy, **options)
    run.predict(module, return_predictions=False)


def together(module: Returning, path: Path, processes: int = 2, **options: Any) -> Ended:
    [ended] = in_fork(lambda: predict(module, path, processes, **options))
    assert ended.code is not None, f"nobody came to an end\n{ended.said}"
    assert not ended.left, ended.said
    return ended


def separated(ids: list[int]) -> list[dict]:
    """Answers with the characters at which Python, but not JSON, ends a line."""
    return [{"question_id": number, "answer": f"a\u2028{number}\x85\n\r"} for number in ids]


class Filling(Several):
    """Ends unevenly: PyTorch's own sampler repeats samples, so that every process has as many."""

    def predict_dataloader(self) -> DataLoader[Any]:
        ids = torch.arange(7)
        return DataLoader(
            ids, batch_size=2, sampler=DistributedSampler(ids, self.trainer.world_size, self.trainer.global_rank)
        )


KINDS = {
    "in order": lambda rank: DataLoader(torch.arange(7), batch_size=2),
    "shuffled": lambda rank: DataLoader(torch.arange(7), batch_size=2, shuffle=True),
    "two loaders": lambda rank: [
        DataLoader(torch.arange(5), batch_size=2),
        DataLoader(torch.arange(10, 17), batch_size=3),
    ],
    "the second without batches": lambda rank: [
        DataLoader(torch.arange(4), batch_size=2),
        loading(torch.arange(10, 20).view(5, 2)),
    ],
}


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_several_processes_write_the_file_that_one_writes(tmp_path: Path, kind: str, processes: int) -> None:
    one, path = tmp_path / "one.jsonl", tmp_path / "results" / "answers.jsonl"
    predict(Several(KINDS[kind], separated), one, 1)
    ended = together(Several(KINDS[kind], separated), path, processes)
    assert ended.code == 0, ended.said
    assert path.read_bytes() == one.read_bytes()
    assert [file.name for file in path.parent.iterdir()] == ["answers.jsonl"]
    ids = [json.loads(line)["question_id"] for line in one.read_text("utf-8").split("\n")[:-1]]
    assert ids == sorted(ids)
    assert len(ids) == {"two loaders": 12, "the second without batches": 14}.get(kind, 7)


def test_samples_that_fill_up_a_share_are_written_once(tmp_path: Path) -> None:
    ended = together(Filling(KINDS["in order"]), tmp_path / "answers.jsonl", use_distributed_sampler=False)
    assert ended.code == 0, ended.said
    assert lines(tmp_path / "answers.jsonl") == named(list(range(7)))


def test_where_indices_are_not_known_the_order_is_by_batch_and_then_by_process(tmp_path: Path) -> None:
    shares = [[0, 1, 4, 5, 6], [2, 3]]  # three batches of one process, one of the other
    module = Several(lambda rank: DataLoader(Stream(shares[rank]), batch_size=2))
    ended = together(module, tmp_path / "answers.jsonl")
    assert ended.code == 0, ended.said
    assert lines(tmp_path / "answers.jsonl") == named(list(range(7)))


def test_a_process_without_a_batch_keeps_nobody_waiting(tmp_path: Path) -> None:
    module = Several(lambda rank: DataLoader(torch.arange(3 * rank), batch_size=2))
    module.allow_zero_length_dataloader_with_multiple_devices = True
    ended = together(module, tmp_path / "answers.jsonl", use_distributed_sampler=False)
    assert ended.code == 0, ended.said
    assert lines(tmp_path / "answers.jsonl") == named([0, 1, 2])


def failing(ids: list[int]) -> list[dict]:
    if 5 in ids:  # the second process's last batch
        raise ValueError("question 5 has no answer")
    return named(ids)


def killed(ids: list[int]) -> list[dict]:
    if 5 in ids:
        os.kill(os.getpid(), signal.SIGKILL)
    return named(ids)


@pytest.mark.parametrize(("make", "message"), [(failing, "question 5 has no answer"), (killed, "SIGKILL")])
def test_nothing_is_joined_where_one_process_fails_and_nothing_of_it_later(
    tmp_path: Path, make: Callable[[list[int]], list[dict]], message: str
) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text("old\n")
    ended = together(Several(KINDS["in order"], make), path)
    assert ended.code == 1
    assert message in ended.said
    assert path.read_text() == "old\n"
    left = {"answers.rank0.jsonl": "of a run with more processes", "answers.rank2.jsonl": '{"order": [0, 0, 0, 0]}\n'}
    for name, text in left.items():
        (tmp_path / name).write_text(text)
    others = {"answers.rankings.jsonl", "my-answers.rank0.jsonl", "answersXrank0.jsonl"}
    for name in others:
        (tmp_path / name).write_text("of somebody else")
    ended = together(Several(KINDS["in order"]), path)
    assert ended.code == 0, ended.said
    assert lines(path) == named(list(range(7)))
    assert {file.name for file in tmp_path.iterdir()} == {"answers.jsonl", *others}


def test_machines_that_share_no_folder_are_named_and_their_files_can_be_joined(tmp_path: Path) -> None:
    ended = in_fork(*two_nodes(lambda node: predict(Several(KINDS["in order"]), path_of(tmp_path, node), 1, **NODES)))
    for one in ended:
        assert (one.code, one.left) == (1, False), one.said
        assert "FileNotFoundError" in one.said
        assert "1 of 2 processes (rank 1) are not here" in one.said
    files = [tmp_path / "node0" / "answers.rank0.jsonl", tmp_path / "node1" / "answers.rank1.jsonl"]
    assert sorted(tmp_path.rglob("*.jsonl")) == files
    merge_answers(files, tmp_path / "answers.jsonl")
    assert lines(tmp_path / "answers.jsonl") == named(list(range(7)))


NODES = {"num_nodes": 2, "strategy": "ddp"}


def path_of(folder: Path, node: int) -> Path:
    return folder / f"node{node}" / "answers.jsonl"


@pytest.mark.parametrize("line", ["", "x", "[1]", '{"question_id": 1, "answer": "no order"}', '{"order": 7}'])
def test_a_damaged_file_of_a_process_is_not_joined(tmp_path: Path, line: str) -> None:
    (tmp_path / "a").write_text('{"order": [0, 1, 0, 0], "question_id": 1, "answer": "yes"}\n' + line + "\n")
    with pytest.raises(ValueError, match="every line of a file that a process of AnswerWriter wrote"):
        merge_answers([tmp_path / "a"], tmp_path / "answers.jsonl")
    assert not (tmp_path / "answers.jsonl").exists()
