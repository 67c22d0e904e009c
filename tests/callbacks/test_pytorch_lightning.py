"""The other package of the same name: `pytorch_lightning` has the same classes a second time."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from torch.utils.data import DataLoader

from catp_lightning import CrossAttentionCalibration, PrunedModule, PruningError, PruningPolicy, TokenPruning, prune
from catp_lightning.callbacks.answer_writer import AnswerWriter
from catp_lightning.modules.vqa import VQAModule
from tests.callbacks.test_calibration import SHORT, Module, data
from tests.callbacks.test_token_pruning import HALF, footprint, same
from tests.support.models import random_blip2
from tests.support.paths import ROOT
from tests.support.tiny_vqa import build_model, opt_config, save_model

pytorch_lightning = pytest.importorskip("pytorch_lightning")

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
STAGES = ("validate", "test", "predict")


class Answering(pytorch_lightning.LightningModule):  # type: ignore[misc, name-defined]
    """A module of a user who has never imported `lightning`."""

    def __init__(self, brings: Sequence[Any] = ()) -> None:
        super().__init__()
        self.net, _ = random_blip2()
        self.net.language_projection.weight.data *= 0.05
        self.seen: list[torch.Tensor] = []
        self.brings = list(brings)

    def configure_callbacks(self) -> list[Any]:
        return self.brings

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(**batch).logits.pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.net(**batch).logits
        self.seen.append(logits)
        self.log("level", logits.abs().mean(), batch_size=len(logits))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net.generate(**batch, **SHORT)


def trainer(*callbacks: Any, **settings: Any) -> Any:
    return pytorch_lightning.Trainer(callbacks=list(callbacks), **{**QUIET, **settings})


def loader() -> DataLoader[Any]:
    return DataLoader(data(24, 8), batch_size=None)  # type: ignore[arg-type]


def by_hand(module: Answering, stage: str) -> list[torch.Tensor]:
    with torch.no_grad(), prune(module.net.eval(), HALF):
        if stage == "predict":
            return [module.net.generate(**batch, **SHORT) for batch in loader()]
        return [module.net(**batch).logits for batch in loader()]


@pytest.mark.parametrize("by", ["the Trainer", "the module"])
@pytest.mark.parametrize("stage", STAGES)
def test_token_pruning_acts_in_a_trainer_of_the_other_package(stage: str, by: str) -> None:
    pruning = TokenPruning(HALF)
    module = Answering([pruning] if by == "the module" else [])
    before = footprint(module)
    run = trainer(*([pruning] if by == "the Trainer" else []))
    returned = getattr(run, stage)(module, loader())
    assert same(returned if stage == "predict" else module.seen, by_hand(module, stage))
    assert pruning.figures == {"catp/tokens_kept": 4, "catp/keep_share": 0.5}
    assert stage == "predict" or returned[0]["catp/keep_share"] == 0.5
    assert footprint(module) == before


def test_a_fit_is_pruned_where_it_validates_and_its_watchers_are_named(tmp_path: Path) -> None:
    module = Answering()
    watchers = [
        pytorch_lightning.callbacks.EarlyStopping("level"),
        pytorch_lightning.callbacks.ModelCheckpoint(tmp_path, monitor="level"),
    ]
    run = trainer(TokenPruning(HALF), *watchers, max_epochs=1, num_sanity_val_steps=0, enable_checkpointing=True)
    with pytest.warns(UserWarning, match=r"EarlyStopping \(monitor='level'\), ModelCheckpoint \(monitor='level'\)"):
        run.fit(module, loader(), loader())
    assert same(module.seen, by_hand(module, "validate"))
    file = watchers[1].best_model_path
    assert PruningPolicy.from_dict(torch.load(file, weights_only=True)["catp_policy"]) == HALF
    fresh = Answering()
    trainer(TokenPruning()).test(fresh, loader(), ckpt_path=file)
    assert same(fresh.seen, module.seen)


def test_the_policy_is_the_one_of_a_trainer_of_lightning(tmp_path: Path) -> None:
    found, module = [], Answering()
    before = footprint(module)
    expected = [module.net.generate(**batch, **SHORT) for batch in loader()]
    for name, run, calibrated in (("one", trainer, module), ("other", lightning_trainer, Module())):
        path = tmp_path / name / "policy.json"
        logger_of = pytorch_lightning if run is trainer else lightning.pytorch
        logger = logger_of.loggers.CSVLogger(tmp_path / name)
        calibration = CrossAttentionCalibration(path, scorer="catp")
        predictions = run(calibration, logger=logger).predict(calibrated, loader())
        assert same(predictions, expected)
        assert "catp/keep-0.5/agreement" in (Path(logger.log_dir) / "metrics.csv").read_text()
        found.append(PruningPolicy.load(path).to_dict())
    assert footprint(module) == before
    assert found[0] == found[1]


def lightning_trainer(*callbacks: Any, **settings: Any) -> lightning.pytorch.Trainer:
    return lightning.pytorch.Trainer(callbacks=list(callbacks), **{**QUIET, **settings})


def test_both_callbacks_in_predict_are_refused_here_too(tmp_path: Path) -> None:
    calibration = CrossAttentionCalibration(tmp_path / "policy.json")
    with pytest.raises(PruningError, match="leave predict out"):
        trainer(TokenPruning(HALF), calibration).predict(Answering(), loader())


def test_an_exception_leaves_the_model_as_it_was() -> None:
    module = Answering()
    before = footprint(module)

    def fail(batch: Any, batch_idx: int) -> None:
        assert footprint(module) != before
        raise RuntimeError("step")

    module.predict_step = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="step"):
        trainer(TokenPruning(HALF)).predict(module, loader())
    assert footprint(module) == before


class Naming(pytorch_lightning.LightningModule):  # type: ignore[misc, name-defined]
    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> list[dict[str, Any]]:
        return [{"question_id": number, "answer": f"answer {number}"} for number in batch.tolist()]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_are_written(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    trainer(AnswerWriter(str(path))).predict(Naming(), DataLoader(torch.arange(5), batch_size=2))
    assert [line["question_id"] for line in lines(path)] == [0, 1, 2, 3, 4]


PROGRAM = """
import sys, torch, pytorch_lightning
from torch.utils.data import DataLoader
from catp_lightning import CrossAttentionCalibration
from catp_lightning.callbacks.answer_writer import AnswerWriter
from tests.callbacks.test_pytorch_lightning import Answering, Naming, data, trainer

if __name__ == "__main__":
    processes, folder = int(sys.argv[1]), sys.argv[2]
    many = {"devices": processes, "strategy": "ddp_spawn" if processes > 1 else "auto"}
    writer = AnswerWriter(folder + "/answers.jsonl")
    trainer(writer, **many).predict(Naming(), DataLoader(torch.arange(7), batch_size=2), return_predictions=False)
    batches = DataLoader(data(24, 5), batch_size=None)
    calibration = CrossAttentionCalibration(folder + "/policy.json", scorer="catp")
    trainer(calibration, **many).predict(Answering(), batches, return_predictions=False)
"""


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    written = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, str(program), str(processes), str(folder)],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("saved to") == 1  # the first process alone speaks
        assert [line["question_id"] for line in lines(folder / "answers.jsonl")] == list(range(7))
        policy = PruningPolicy.load(folder / "policy.json")
        written.append((sorted(file.name for file in folder.iterdir()), policy.scorer_args, policy.evidence["samples"]))
    assert written[0] == written[1]


def test_a_module_of_the_other_package_is_not_wrapped_and_the_error_says_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"Answering one of pytorch_lightning.*TokenPruning\(policy\)"):
        PrunedModule(Answering(), HALF)  # type: ignore[arg-type]


def test_modules_of_ours_in_a_trainer_of_the_other_package_are_refused_by_it(tmp_path: Path) -> None:
    folder = save_model(tmp_path, opt_config())
    ours = [PrunedModule(Module(), HALF), VQAModule(build_model(opt_config()), folder)]
    for module in ours:
        with pytest.raises(TypeError, match="`model` must be a `LightningModule`"):
            trainer().predict(module, loader())
