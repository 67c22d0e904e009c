"""VQAModule scores every evaluation data set by its own metric, under a Trainer."""

from itertools import chain
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from catp_lightning import PruningPolicy, TokenPruning
from catp_lightning.data.benchmarks import BenchmarkDataModule
from catp_lightning.errors import DataError
from catp_lightning.metrics.benchmarks import BENCHMARKS
from catp_lightning.modules.vqa import VQAModule
from tests.support.benchmark_files import DATA_SETS, pope
from tests.support.tiny_vqa import opt_config, save_model
from tests.support.trainers import trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"), opt_config())


@pytest.fixture(scope="module")
def module(folder: str) -> VQAModule:
    return VQAModule(folder, generation={"max_new_tokens": 3})


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA_SETS)
def test_figures_are_those_of_the_metric_on_the_predictions(
    name: str, module: VQAModule, folder: str, tmp_path: Path
) -> None:
    data = BenchmarkDataModule(folder, val=DATA_SETS[name](tmp_path), batch_size=2)
    answers = list(chain(*trainer().predict(module, data)))
    records = data.val_dataloader().dataset.records
    assert [answer["question_id"] for answer in answers] == [record.question_id for record in records]
    metric = BENCHMARKS[name]()
    metric.update([answer["answer"] for answer in answers], [record.reference for record in records])
    expected = {f"val/{name}_{figure}": value.item() for figure, value in metric.compute().items()}
    (logged,) = trainer().validate(module, data, verbose=False)
    assert logged == pytest.approx(expected, abs=1e-6)
    assert trainer().validate(module, data, verbose=False) == [logged], "a second epoch starts from nothing"


def test_answers_of_the_data_set_itself_are_right_under_pruning(folder: str, tmp_path: Path) -> None:
    class Oracle(VQAModule):
        def answer(self, batch):
            super().answer(batch)
            return [{"yes": "Yes, there is.", "no": "No."}[label] for label in batch["references"]]

    data = BenchmarkDataModule(folder, test=pope(tmp_path), batch_size=4)
    pruning = TokenPruning(PruningPolicy("l2-norm", keep=0.5))
    (logged,) = trainer(pruning).test(Oracle(folder, generation={"max_new_tokens": 2}), data, verbose=False)
    assert logged["test/pope_accuracy"] == logged["test/pope_f1"] == 1.0
    assert logged["test/pope_yes_ratio"] == 0.5 and logged["catp/tokens_kept"] == 2


def test_a_split_without_answers_can_only_be_predicted(module: VQAModule, folder: str, tmp_path: Path) -> None:
    data = BenchmarkDataModule(folder, val=pope(tmp_path))
    batch = next(iter(data.val_dataloader()))
    del batch["references"]
    with pytest.raises(DataError, match=r"val split has no answers.*a file with answers, or run trainer\.predict"):
        trainer().validate(module, DataLoader([batch], batch_size=None), verbose=False)
    assert len(trainer().predict(module, DataLoader([batch], batch_size=None))[0]) == 6
