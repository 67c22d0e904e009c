"""The other package of the same name: `pytorch_lightning` has the same classes a second time."""

from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from torch.utils.data import DataLoader

from catp_lightning import CrossAttentionCalibration, PrunedModule, PruningPolicy, TokenPruning, prune
from catp_lightning.callbacks.answer_writer import AnswerWriter
from catp_lightning.modules.vqa import VQAModule
from tests.support.answer_files import lines
from tests.support.calibrations import data
from tests.support.footprints import footprint
from tests.support.models import SHORT
from tests.support.modules import Generating, same
from tests.support.other_lightning import Answering, Naming, pytorch_lightning, trainer
from tests.support.policies import HALF
from tests.support.processes import finished
from tests.support.small_calibrations import QUICKEST
from tests.support.tiny_vqa import build_model, opt_config, save_model
from tests.support.trainers import STAGES, loading
from tests.support.trainers import trainer as lightning_trainer


def loader() -> DataLoader[Any]:
    return loading(data(24, 8))


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


@pytest.mark.slow
def test_the_policy_is_the_one_of_a_trainer_of_lightning(tmp_path: Path) -> None:
    found, module = [], Answering()
    before = footprint(module)
    expected = [module.net.generate(**batch, **SHORT) for batch in loader()]
    for name, run, calibrated in (("one", trainer, module), ("other", lightning_trainer, Generating())):
        path = tmp_path / name / "policy.json"
        logger_of = pytorch_lightning if run is trainer else lightning.pytorch
        logger = logger_of.loggers.CSVLogger(tmp_path / name)
        calibration = CrossAttentionCalibration(path, scorer="catp", settings=QUICKEST)
        predictions = run(calibration, logger=logger).predict(calibrated, loader())
        assert same(predictions, expected)
        found.append(PruningPolicy.load(path).to_dict())
        header, values = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[:2]
        agreement = dict(zip(header.split(","), values.split(","), strict=True))["catp/keep-0.5/agreement"]
        assert float(agreement) == pytest.approx(found[-1]["evidence"]["retention"][0]["agreement"])
    assert footprint(module) == before
    assert found[0] == found[1]


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


def test_answers_are_written(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    trainer(AnswerWriter(str(path))).predict(Naming(), DataLoader(torch.arange(5), batch_size=2))
    assert [line["question_id"] for line in lines(path)] == [0, 1, 2, 3, 4]


PROGRAM = """
import sys, torch, pytorch_lightning
from torch.utils.data import DataLoader
from catp_lightning import CrossAttentionCalibration
from catp_lightning.callbacks.answer_writer import AnswerWriter
from tests.support.calibrations import data
from tests.support.other_lightning import Answering, Naming, trainer

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
    written = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        done = finished(program, processes, folder)
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
    ours = [PrunedModule(Generating(), HALF), VQAModule(build_model(opt_config()), folder)]
    for module in ours:
        with pytest.raises(TypeError, match="`model` must be a `LightningModule`"):
            trainer().predict(module, loader())
