"""AnswerWriter in several processes and on several machines: one file, in order."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from catp_lightning.callbacks.answer_writer import AnswerWriter, merge_answers
from tests.support.answer_files import Returning, lines, named
from tests.support.processes import Ended, in_fork, two_nodes
from tests.support.trainers import Stream, loading, trainer


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


@pytest.mark.slow
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
