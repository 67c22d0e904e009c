"""TokenPruning beside every callback of Lightning's, and callbacks that ask the model."""

import inspect
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks as lightning_callbacks
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from catp_lightning import TokenPruning, prune
from tests.support.footprints import footprint
from tests.support.loops import Still, answers
from tests.support.modules import Answering, by_hand, same, unpruned
from tests.support.policies import HALF
from tests.support.trainers import STAGES, trainer

ARGUMENTS: dict[str, dict[str, Any]] = {
    "BackboneFinetuning": {"unfreeze_backbone_at_epoch": 1},
    "BatchSizeFinder": {"max_trials": 1, "steps_per_trial": 1},
    "EarlyStopping": {"monitor": "val_level"},
    "EMAWeightAveraging": {"decay": 0.5},
    "GradientAccumulationScheduler": {"scheduling": {0: 2}},
    "LambdaCallback": {"on_validation_start": lambda *_: None},
    "LearningRateFinder": {"num_training_steps": 2, "update_attr": True},
    "OnExceptionCheckpoint": {"dirpath": "."},
    "ModelPruning": {"pruning_fn": "l1_unstructured", "amount": 0.1},
    "StochasticWeightAveraging": {"swa_lrs": 1e-3, "swa_epoch_start": 1},
    "ThroughputMonitor": {"batch_size_fn": lambda batch: len(batch["input_ids"])},
}
ABSTRACT = {"BaseFinetuning", "BasePredictionWriter", "Callback", "Checkpoint", "ProgressBar"}
NEIGHBOURS = sorted(
    name
    for name, value in vars(lightning_callbacks).items()
    if inspect.isclass(value) and issubclass(value, Callback) and name not in ABSTRACT
)


class Backboned(Answering):
    """As some callbacks want a module: a backbone, a learning rate, a batch size."""

    lr, batch_size = 1e-3, 1

    @property
    def backbone(self) -> torch.nn.Module:
        return self.model.language_projection

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [weight for weight in self.parameters() if weight.requires_grad]
        return torch.optim.SGD(trained, lr=self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        one = {name: value[0] for name, value in self.inputs.items()}
        return DataLoader([one] * 4, batch_size=self.batch_size)  # type: ignore[arg-type]


class PrunedByHand(Backboned):
    """What TokenPruning should amount to."""

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        with prune(self.model, HALF):
            super().validation_step(batch, batch_idx)


QUICK = {"EarlyStopping", "LearningRateMonitor", "ModelCheckpoint", "StochasticWeightAveraging"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NEIGHBOURS]
)
def test_beside_every_callback_of_lightning_a_fit_is_what_it_is_with_validation_pruned_by_hand(
    name: str, tmp_path: Path
) -> None:
    """The same validation outputs, whatever weights others swap in, and the same weights: first or last in the list."""
    found = []
    for place in ("by hand", "first", "last"):
        torch.manual_seed(0)
        module = PrunedByHand() if place == "by hand" else Backboned()
        neighbour, pruning = getattr(lightning_callbacks, name)(**ARGUMENTS.get(name, {})), TokenPruning(HALF)
        callbacks = {"by hand": [neighbour], "first": [pruning, neighbour], "last": [neighbour, pruning]}[place]
        run = trainer(
            *callbacks, max_epochs=2, limit_train_batches=1, limit_val_batches=1, num_sanity_val_steps=0,
            default_root_dir=tmp_path, enable_checkpointing=True, logger=CSVLogger(tmp_path), log_every_n_steps=1,
            enable_progress_bar=isinstance(neighbour, ProgressBar), enable_model_summary="Summary" in name,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run.fit(module, val_dataloaders=module.loader())
        found.append((module.seen, module.state_dict(), footprint(module)))
    (expected, weights, left), *others = found
    assert len(expected) >= 4
    for seen, state, after in others:
        assert same(seen[-4:], expected[-4:])  # the trials of the Tuner before run without callbacks, so unpruned
        assert state.keys() == weights.keys()
        assert all(torch.equal(value, weights[key]) for key, value in state.items())
        assert after == left


class Asks(Callback):
    """A neighbour that asks the model something of its own in every hook of a loop."""

    def __init__(self, module: Answering) -> None:
        self.module, self.heard, self.running = module, [], True
        for stage in ("validation", "test", "predict"):
            for moment in ("start", "epoch_start", "batch_start", "batch_end", "epoch_end", "end"):
                setattr(self, f"on_{stage}_{moment}", self.ask)

    def ask(self, *args: Any) -> None:
        with torch.no_grad():
            self.heard.append(self.module.model(**self.module.inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_what_other_callbacks_ask_the_model_while_the_loop_runs_is_pruned_too_and_changes_nothing(stage: str) -> None:
    module = Answering()
    expected, plain, before = by_hand(module), unpruned(module), footprint(module)
    first, last, pruning = Asks(module), Asks(module), TokenPruning(HALF)
    assert same(answers(module, stage, first, pruning, last), expected)
    assert pruning.figures == {"catp/tokens_kept": 4, "catp/keep_share": 0.5}
    assert footprint(module) == before
    assert len(first.heard) == len(last.heard) == 8  # two batches
    inside = [torch.equal(heard, expected[0]) for heard in first.heard]
    assert inside == [False, *[True] * 7]  # the loop starts after it was asked
    assert torch.equal(first.heard[0], plain[0])
    inside = [torch.equal(heard, expected[0]) for heard in last.heard]
    assert inside == [*[True] * 7, False]  # the loop ends before it is asked
    assert torch.equal(last.heard[-1], plain[0])


def test_early_stopping_watches_the_pruned_model() -> None:
    module = Still()
    stopping = EarlyStopping("val_level", patience=2)
    run = trainer(stopping, TokenPruning(HALF), max_epochs=9, limit_val_batches=1)
    with pytest.warns(UserWarning, match="TokenPruning prunes validation inside fit"):
        run.fit(module, module.loader(1), module.loader())
    assert stopping.best_score == by_hand(module)[0].abs().mean()
    assert run.current_epoch == 3  # one that sets the score and two that do not better it


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_callbacks_that_the_module_brings_itself_are_as_good(stage: str) -> None:
    class Brings(Answering):
        def configure_callbacks(self) -> list[Callback]:
            return [TokenPruning(HALF)]

    module = Brings()
    before = footprint(module)
    run = trainer()
    for _ in range(2):  # Lightning keeps them in the Trainer, and asks again
        module.seen.clear()
        returned = getattr(run, stage)(module, module.loader())
        assert same(returned if stage == "predict" else module.seen, by_hand(module))
    assert footprint(module) == before
