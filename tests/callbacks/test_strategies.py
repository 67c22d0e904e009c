"""Pruning and calibrating in several real processes: what one finds, several find; none waits for ever."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from catp_lightning.calibration.replay import memory
from catp_lightning.callbacks.calibration import CrossAttentionCalibration
from catp_lightning.callbacks.token_pruning import TokenPruning
from catp_lightning.errors import PruningError
from catp_lightning.policy import PruningPolicy
from tests.support.paths import ROOT
from tests.support.processes import in_fork, in_program, ranks, two_nodes
from tests.support.several_processes import (
    POLICY,
    Failing,
    Found,
    Remembering,
    Sample,
    Trained,
    check,
    close,
    each,
    evaluate,
    loader,
    samples,
)
from tests.support.small_calibrations import QUICKEST
from tests.support.trainers import QUIET, Stream, trainer

pytestmark = pytest.mark.usefixtures("no_report")


def evaluations(processes: int) -> dict[str, Found]:
    several = {"devices": processes, "strategy": "ddp"} if processes > 1 else {"devices": 1}
    runs = {"callback": ["validate 12", "validate 7", "predict 7"], "wrapped": ["predict 7"]}
    return {
        f"{run} {by}": evaluate(run.split()[0], loader(int(run.split()[1])), by == "wrapped", **several)
        for by in runs
        for run in runs[by]
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, Found]:
    found = evaluations(1)
    assert 0 < found["predict 7 callback"]["figures"]["catp/agreement"] < 1, "or nothing could go wrong unseen"
    return found


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_predictions_and_figures_are_those_of_one_process(
    tmp_path: Path, alone: dict[str, Found], processes: int
) -> None:
    together = each(tmp_path, lambda rank: evaluations(processes), processes)
    for name, one in alone.items():
        mine = [found[name] for found in together]
        answers = sorted(answer for found in mine for answer in found["answers"])
        assert [answer for n, answer in enumerate(answers) if answer not in answers[:n]] == one["answers"]
        assert mine[0]["overlap"] == one["overlap"]
        assert len(one["overlap"]) == 1
        assert not any(found["unsynchronised"] for found in mine)
        if "7" not in name or "predict" in name:  # every sample is answered once
            assert len(answers) == len(one["answers"])
            for found in mine:
                assert close(found["figures"], one["figures"])
                assert close(found["logged"], one["logged"])


def test_validation_of_an_uneven_split_counts_the_samples_that_lightning_repeats(
    tmp_path: Path, alone: dict[str, Found]
) -> None:
    """Seven samples in two processes are eight answers: figures are means over all eight."""
    pruned = dict(alone["validate 7 callback"]["answers"])
    plain = Remembering()
    for batch in loader(7):
        plain._answer(batch)
    same = {number: answer == pruned[number] for number, answer in plain.answers}
    run = {"devices": 2, "strategy": "ddp"}
    first, second = each(tmp_path, lambda rank: evaluate("validate", loader(7), **run), 2)
    seen = [number for number, _ in first["answers"] + second["answers"]]
    assert sorted(seen) == [0, 0, 1, 2, 3, 4, 5, 6]
    expected = sum(same[number] for number in seen) / 8
    for found in (first, second):
        assert found["figures"]["catp/agreement"] == pytest.approx(expected)
        assert found["logged"]["catp/agreement"] == pytest.approx(expected)


def shared_out(rank: int, kind: str) -> DataLoader[Sample]:
    """Seven samples, five batches and one; or all of them in the second process."""
    parts = {"uneven": [samples(7)[:6], samples(7)[6:]], "none": [[], samples(7)], "empty stream": [[], samples(7)]}
    mine = parts[kind][rank]
    data: Any = Stream(mine) if kind == "empty stream" else mine
    return DataLoader(data, batch_size=1 if kind == "uneven" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uneven", "none", "empty stream"])
def test_processes_with_other_numbers_of_batches_do_not_wait_for_ever(
    tmp_path: Path, alone: dict[str, Found], kind: str
) -> None:
    options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}

    def work(rank: int) -> list[Found]:
        if kind != "uneven":  # what it logs is synchronised: Lightning itself would wait for who never logs it
            Remembering.validation_step = Remembering.test_step  # type: ignore[method-assign]
        stages = [("predict", False), ("test", False), ("validate", False), ("test", True)]
        return [evaluate(stage, shared_out(rank, kind), wrapped, **options) for stage, wrapped in stages]

    first, second = each(tmp_path, work, 2)
    one = alone["predict 7 callback"]
    for stage, (mine, other) in enumerate(zip(first, second, strict=True)):
        assert sorted(mine["answers"] + other["answers"]) == one["answers"]
        assert mine["overlap"] == one["overlap"]  # the first process says it, even where it had no batch
        if stage < 3:
            assert close(mine["figures"], one["figures"])
            assert close(other["figures"], one["figures"])


def test_fit_is_refused_in_all_processes_where_some_have_nothing_to_validate(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        module = Trained()
        trainer = Trainer(
            callbacks=[TokenPruning(POLICY)], devices=2, strategy="ddp", use_distributed_sampler=False, max_epochs=1,
            num_sanity_val_steps=0, **QUIET,
        )  # fmt: skip
        with pytest.raises(PruningError, match="only 1 of 2 have batches to validate"):
            trainer.fit(module, loader(2), DataLoader(samples(2) if rank else [], batch_size=2))  # type: ignore[arg-type]

    check(in_fork(*ranks(work, 2)))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "failing"), [("validate", 0), ("predict", 1)])
def test_one_process_that_raises_ends_all(tmp_path: Path, stage: str, failing: int) -> None:
    def work(rank: int) -> None:
        callbacks: list[Callback] = [TokenPruning(POLICY, compare=True)]
        trainer = Trainer(callbacks=callbacks, devices=2, strategy="ddp", **QUIET)
        getattr(trainer, stage)(Failing(failing), loader(12))

    ended = in_fork(*ranks(work, 2), seconds=60)
    assert f"ValueError: process {failing} cannot read this image" in ended[failing].said
    for one in ended:
        assert one.code == 1, one.said[-2000:]
        assert not one.left


def test_on_several_machines_predictions_are_those_of_one_process(tmp_path: Path, alone: dict[str, Found]) -> None:
    def work(node: int) -> None:
        found = evaluate("predict", loader(7), num_nodes=2, devices=1, strategy="ddp")
        torch.save(found, tmp_path / f"{node}.pt")

    check(in_fork(*two_nodes(work)))
    first, second = (torch.load(tmp_path / f"{node}.pt") for node in range(2))
    one = alone["predict 7 callback"]
    assert [number for number, _ in second["answers"]] == [1, 3, 5]
    assert sorted(first["answers"] + second["answers"]) == one["answers"]
    assert close(first["figures"], one["figures"])
    assert close(second["figures"], one["figures"])


def loader_of(mine: list[Sample]) -> DataLoader[Sample]:
    return DataLoader(mine, batch_size=8)  # type: ignore[arg-type]


def calibrate(path: Path, data: DataLoader[Sample], module: Remembering, **options: Any) -> None:
    callback = CrossAttentionCalibration(path, keep=0.5, scorer="catp", settings=QUICKEST)
    trainer(callback, **options).predict(module, data, return_predictions=False)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> PruningPolicy:
    path = tmp_path_factory.mktemp("alone") / "policy.json"
    calibrate(path, loader_of(samples(24)), Remembering(), devices=1)
    return PruningPolicy.load(path)


def same_decision(one: PruningPolicy, other: PruningPolicy) -> bool:
    return (replace(one, evidence={}), one.evidence["chosen"], one.evidence["samples"], one.evidence["images"]) == (
        replace(other, evidence={}), other.evidence["chosen"], other.evidence["samples"], other.evidence["images"],
    )  # fmt: skip


@pytest.mark.slow
def test_several_machines_calibrate_together_and_write_one_policy(
    tmp_path: Path, calibrated: PruningPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "LIMIT", 0)  # the step runs again for every pass, and sees what was written meanwhile

    class Looking(Remembering):
        def predict_step(self, batch: Sample, batch_idx: int) -> list[dict[str, Any]]:
            # Not the dotted names: another machine may be writing its part at this moment.
            self.parts |= {file.name for file in tmp_path.glob("policy.json.partial*")}
            return super().predict_step(batch, batch_idx)

    def work(node: int) -> None:
        module = Looking()
        module.parts = set()
        calibrate(tmp_path / "policy.json", loader_of(samples(24)), module, num_nodes=2, devices=1, strategy="ddp")
        (tmp_path / f"seen{node}").write_text(" ".join(sorted(module.parts)))

    check(in_fork(*two_nodes(work)))
    assert same_decision(PruningPolicy.load(tmp_path / "policy.json"), calibrated)
    parts = "policy.json.partial-0.safetensors policy.json.partial-1.safetensors"
    assert [(tmp_path / f"seen{node}").read_text() for node in range(2)] == [parts, parts]
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.slow
def test_a_process_without_a_batch_takes_part_in_a_calibration(tmp_path: Path, calibrated: PruningPolicy) -> None:
    def work(rank: int) -> None:
        mine = samples(24) if rank else []
        options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
        calibrate(tmp_path / "policy.json", loader_of(mine), Remembering(), **options)

    check(in_fork(*ranks(work, 2)))
    assert same_decision(PruningPolicy.load(tmp_path / "policy.json"), calibrated)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_a_program_that_lightning_starts_several_times_fits_and_ends_with_the_error_of_one(
    tmp_path: Path, strategy: str
) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text("old\n")
    [ended] = in_program(([str(PROGRAM), str(tmp_path), strategy, "2", "1"], {}))
    assert "ValueError: process 1 cannot read this image" in ended.said, ended.said[-4000:]
    assert ended.code not in (None, 0)
    assert not ended.left
    assert path.read_text() == "old\n"
    if strategy == "ddp":
        expected = evaluate("validate", loader(12))["figures"]
        for rank in range(2):
            found = torch.load(tmp_path / f"{rank}.pt")
            assert close(found["figures"], expected)
            assert found["epochs"] == 3


PROGRAM = ROOT / "tests/support/ddp_program.py"


@pytest.mark.slow
def test_under_torchrun_predictions_are_those_of_one_process(tmp_path: Path, alone: dict[str, Found]) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    [ended] = in_program(([*launch, str(PROGRAM), str(tmp_path), "ddp", "2", "-1"], {}))
    check([ended])
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    expected = dict(evaluate("predict", loader(12))["answers"])
    assert [json.loads(line) for line in lines] == [
        {"question_id": number, "answer": str(answer)} for number, answer in expected.items()
    ]
