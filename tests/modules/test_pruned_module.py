"""PrunedModule: the module inside, with three steps pruned and nothing else changed."""

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torchmetrics import MeanMetric

from catp_lightning.callbacks.token_pruning import TokenPruning
from catp_lightning.errors import PolicyError, PruningError
from catp_lightning.modules.pruned import PrunedModule
from tests.support.footprints import footprint
from tests.support.many_sided import ManySided, Marks, Predicting, logits
from tests.support.models import random_blip2
from tests.support.modules import same
from tests.support.policies import HALF
from tests.support.trainers import trainer


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_outputs_are_those_of_prune_by_hand_and_the_model_is_left_as_it_was(stage: str) -> None:
    module = ManySided()
    before, expected, plain = footprint(module), logits(module, HALF), logits(module)
    assert not same(expected, plain)
    returned = getattr(trainer(), stage)(PrunedModule(module, HALF))
    assert same(returned if stage == "predict" else module.seen, expected)
    assert footprint(module) == before
    assert same(logits(module), plain)


def test_a_decorated_predict_step_without_batch_idx_runs_pruned() -> None:
    module = Predicting()
    expected = [2 * value for value in logits(module, HALF)]
    assert same(trainer().predict(PrunedModule(module, HALF)), expected)


def test_forward_and_training_are_the_modules_own() -> None:
    plain, inner = ManySided(), ManySided()
    wrapper = PrunedModule(inner, HALF)
    with torch.no_grad():
        assert torch.equal(wrapper(inner.inputs), plain(plain.inputs))
    for root in (plain, wrapper):
        trainer(max_epochs=1, num_sanity_val_steps=0, limit_train_batches=1).fit(root)
    assert all(map(torch.equal, plain.model.state_dict().values(), inner.model.state_dict().values()))
    assert torch.equal(plain.seen[0], inner.seen[0])
    assert same(inner.seen[1:], logits(inner, HALF))
    assert same(plain.seen[1:], logits(plain))


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_it_logs_what_the_module_logs(tmp_path: Path, keep: float) -> None:
    found = []
    for name, root in (("plain", ManySided()), ("pruned", PrunedModule(ManySided(), HALF.with_keep(keep)))):
        logger = CSVLogger(tmp_path, name=name)
        run = trainer(logger=logger, max_epochs=1, limit_train_batches=1, num_sanity_val_steps=0, log_every_n_steps=1)
        run.fit(root)
        run.validate(root)  # metrics are found again in a second run
        found.append((set(run.callback_metrics), run.callback_metrics["val_level"].item()))
        hparams = (Path(logger.log_dir) / "hparams.yaml").read_text()
        assert "rate: 0.001" in hparams
        assert "model: random" in hparams
    assert found[0][0] == found[1][0] == {"val_level", "val_batches"}
    assert (found[0][1] == pytest.approx(found[1][1], rel=1e-5)) == (keep == 1.0)


HOOKS = sorted(
    name
    for name in set(dir(LightningModule)) - set(dir(torch.nn.Module))
    if not name.startswith("_") and callable(getattr(LightningModule, name))
)
COUNTED = ("on_", "configure_", "optimizer_", "lr_scheduler_", "transfer_", "prepare_", "setup", "teardown")


def counting(calls: Counter[str]) -> type[ManySided]:
    """A module that overrides every hook of Lightning, each counting its calls."""

    def hook(name: str) -> Callable[..., Any]:
        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return getattr(ManySided, name)(self, *args, **kwargs)

        return counted

    hooks = [name for name in HOOKS if name.startswith(COUNTED) and name != "configure_sharded_model"]  # deprecated
    return type("Counting", (ManySided,), {name: hook(name) for name in hooks})


def test_every_hook_that_the_module_overrides_is_called_as_often_as_without_the_wrapper(tmp_path: Path) -> None:
    counts = []
    for wrap in (lambda module: module, lambda module: PrunedModule(module, HALF)):
        calls: Counter[str] = Counter()
        root = wrap(counting(calls)())
        run = trainer(ModelCheckpoint(tmp_path, save_last=True), max_epochs=1, enable_checkpointing=True)
        run.fit(root)
        for stage in (run.validate, run.test, run.predict):
            stage(root, ckpt_path=str(next(tmp_path.glob("*.ckpt"))))
        counts.append(calls)
        for file in tmp_path.glob("*.ckpt"):
            file.unlink()
    assert counts[0] == counts[1]
    assert len(counts[0]) > 40
    assert counts[0]["on_fit_start"] == 1
    assert counts[0]["optimizer_step"] == 2


@pytest.mark.parametrize("inner", [LightningModule, ManySided, Predicting])
def test_a_hook_looks_overridden_exactly_if_the_module_overrides_it(inner: type[LightningModule]) -> None:
    module = inner()
    wrapper = PrunedModule(module, HALF)
    own = {"setup", "on_save_checkpoint", "on_load_checkpoint", "load_from_checkpoint"}  # these call the module's
    hooks = [name for name in HOOKS if name not in own]
    differ = [name for name in hooks if is_overridden(name, wrapper) != is_overridden(name, module)]
    assert differ == []
    assert len(hooks) > 70


@pytest.mark.parametrize("error", [RuntimeError("step"), KeyboardInterrupt()], ids=["exception", "interrupt"])
@pytest.mark.parametrize(
    ("stage", "step"), [("validate", "validation_step"), ("test", "test_step"), ("predict", "forward")]
)
def test_an_exception_in_a_step_leaves_the_model_as_it_was(stage: str, step: str, error: BaseException) -> None:
    module = ManySided()
    before, plain = footprint(module.model), logits(module)

    def fail(batch: dict[str, torch.Tensor], batch_idx: int = 0) -> None:
        assert footprint(module.model) != before
        raise error

    setattr(module, step, fail)
    with pytest.raises((RuntimeError, SystemExit)):
        getattr(trainer(), stage)(PrunedModule(module, HALF))
    assert footprint(module.model) == before
    assert same(logits(module), plain)


def test_callbacks_read_and_set_attributes_of_the_module_inside() -> None:
    module, added = ManySided(), []

    class Reaches(Callback):
        def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
            pl_module.batches = 1  # read by the module's loader
            added.append((pl_module.model is module.model, any(isinstance(c, Marks) for c in trainer.callbacks)))

    assert len(trainer(Reaches()).predict(PrunedModule(module, HALF))) == 1
    assert module.batches == 1
    assert added == [(True, True)]
    with pytest.raises(AttributeError, match="nowhere"):
        PrunedModule(module, HALF).nowhere  # noqa: B018


@pytest.mark.parametrize(
    "name",
    [
        "automatic_optimization",
        "strict_loading",
        "prepare_data_per_node",
        "allow_zero_length_dataloader_with_multiple_devices",
    ],
)
def test_settings_of_the_module_are_those_of_the_wrapper_both_ways(name: str) -> None:
    module = ManySided()
    wrapper, other = PrunedModule(module, HALF), not getattr(module, name)
    setattr(module, name, other)
    assert getattr(wrapper, name) is other
    setattr(wrapper, name, not other)
    assert getattr(module, name) is not other


def test_metrics_made_in_setup_are_found_in_every_run() -> None:
    class Fresh(ManySided):
        def setup(self, stage: str) -> None:
            self.seen.append(self.level)  # alive, so that no new metric gets its id
            self.level = MeanMetric()

    wrapper, run = PrunedModule(Fresh(), HALF), trainer()
    levels = [run.validate(wrapper)[0]["val_level"] for _ in range(2)]
    assert levels[0] == levels[1] > 0


def test_paths_are_read_at_setup_and_by_hand_at_the_first_step(tmp_path: Path) -> None:
    module = ManySided()
    wrapper = PrunedModule(module, tmp_path / "policies", keep=0.25)
    with pytest.raises(PolicyError, match="policies"):
        trainer().predict(wrapper)
    for keep in (0.5, 0.25):
        HALF.with_keep(keep).save(tmp_path / "policies" / f"keep-{keep}.json")
    quarter = logits(module, HALF.with_keep(0.25))
    assert same(trainer().predict(wrapper), quarter)
    alone = PrunedModule(module, str(tmp_path / "policies"), keep=0.25)
    with torch.no_grad():
        assert torch.equal(alone.predict_step(module.inputs), quarter[0])


def test_whoever_watches_validation_metrics_is_told() -> None:
    with pytest.warns(UserWarning, match=r"PrunedModule prunes validation inside fit.*EarlyStopping"):
        trainer(EarlyStopping("val_level"), max_epochs=1, limit_train_batches=1).fit(PrunedModule(ManySided(), HALF))


def test_a_strategy_that_shards_is_refused_and_points_to_the_callback() -> None:
    wrapper = PrunedModule(ManySided(), HALF)
    run = trainer()
    run._accelerator_connector.strategy = FSDPStrategy()  # FSDP itself does not run on a CPU
    wrapper.trainer = run
    with pytest.raises(PruningError, match=r"FSDPStrategy.*TokenPruning"):
        wrapper.setup("predict")


def test_the_callback_on_top_of_the_wrapper_is_refused() -> None:
    module = ManySided()
    before = footprint(module.model)
    with pytest.raises(PruningError, match="being pruned already"):
        trainer(TokenPruning(HALF)).predict(PrunedModule(module, HALF))
    assert footprint(module.model) == before


def test_a_model_of_transformers_alone_is_refused_with_what_to_do() -> None:
    model, _ = random_blip2()
    with pytest.raises(TypeError, match="with prune"):
        PrunedModule(model, HALF)  # type: ignore[arg-type]


def test_it_adds_no_warning_of_its_own() -> None:
    counts = []
    for root in (ManySided(), PrunedModule(ManySided(), HALF)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer().predict(root)
        counts.append(sorted({str(warning.message) for warning in caught}))
    assert counts[0] == counts[1]
