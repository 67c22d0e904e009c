"""PrunedModule: the module inside, with three steps pruned and nothing else changed."""

import copy
import functools
import pickle
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
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from catp_lightning.callbacks.token_pruning import TokenPruning
from catp_lightning.errors import PolicyError, PruningError
from catp_lightning.modules.pruned import PrunedModule
from catp_lightning.policy import PruningPolicy
from catp_lightning.pruning import prune
from tests.support.footprints import footprint
from tests.support.models import random_blip2
from tests.support.modules import same
from tests.support.policies import HALF
from tests.support.trainers import trainer


class Marks(Callback):
    """What a module brings with configure_callbacks."""


class ManySided(LightningModule):
    """A user's module that uses much of Lightning: hyperparameters, metrics, hooks, callbacks."""

    def __init__(self, model: str = "random", policy: str = "none", rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model, self.inputs = random_blip2()
        self.model.vision_model.requires_grad_(False)
        self.level = MeanMetric()
        self.batches, self.seen, self.calls = 2, [], Counter[str]()

    def loader(self) -> DataLoader[dict[str, torch.Tensor]]:
        one = {name: value[:1] for name, value in self.inputs.items()}
        return DataLoader([self.inputs, one][: self.batches], batch_size=None)  # type: ignore[arg-type]

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model(**batch).logits

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams["rate"])
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}

    def configure_callbacks(self) -> list[Callback]:
        return [Marks()]

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        logits = self(batch)
        self.seen.append(logits.detach())
        self.log("train_level", logits.detach().abs().mean(), batch_size=1)
        return logits.float().pow(2).mean()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        logits = self(batch)
        self.seen.append(logits)
        self.level(logits.abs().mean())
        self.log("val_level", self.level, batch_size=1)

    def test_step(self, batch: dict[str, torch.Tensor]) -> None:  # without batch_idx, as Lightning allows
        self.seen.append(self(batch))

    def on_validation_epoch_end(self) -> None:
        self.log("val_batches", float(len(self.seen)))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 7

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.calls[f"loaded {checkpoint['mine']}"] += 1

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Without the vision tower, as modules with frozen parts do."""
        return {key: value for key, value in super().state_dict(*args, **kwargs).items() if "vision_model" not in key}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict({**super().state_dict(), **state_dict}, strict=strict, assign=assign)


class Predicting(ManySided):
    """With a predict_step of its own, decorated and without batch_idx."""

    @staticmethod
    def _doubled(step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def doubled(self: Any, *args: Any) -> Any:
            return 2 * step(self, *args)

        return doubled

    @_doubled
    def predict_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self(batch)


def logits(module: ManySided, policy: PruningPolicy | None = None) -> list[torch.Tensor]:
    module.model.eval()
    with torch.no_grad():
        if policy is None:
            return [module.model(**batch).logits for batch in module.loader()]
        with prune(module.model, policy):
            return [module.model(**batch).logits for batch in module.loader()]


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


def test_either_class_reads_the_checkpoints_of_the_other(tmp_path: Path) -> None:
    trained, files = ManySided(rate=0.1), {}
    plain, wrapped = copy.deepcopy(trained), PrunedModule(copy.deepcopy(trained), HALF)
    for name, root in (("plain", plain), ("wrapped", wrapped)):
        checkpoint = ModelCheckpoint(tmp_path / name, monitor=None)
        trainer(checkpoint, max_epochs=1, limit_train_batches=1, limit_val_batches=0, enable_checkpointing=True).fit(
            root
        )
        files[name] = checkpoint.best_model_path
    saved = {name: torch.load(file, weights_only=True) for name, file in files.items()}
    assert list(saved["plain"]["state_dict"]) == list(saved["wrapped"]["state_dict"])
    assert not any("vision_model" in key for key in saved["wrapped"]["state_dict"])
    assert saved["wrapped"]["hyper_parameters"] == saved["plain"]["hyper_parameters"]
    assert saved["wrapped"]["mine"] == 7
    assert PruningPolicy.from_dict(saved["wrapped"].pop("catp_policy")) == HALF
    assert set(saved["wrapped"]) == set(saved["plain"])

    for name, file in files.items():
        fresh = ManySided()
        trainer(enable_checkpointing=True).validate(fresh, ckpt_path=file)
        assert same(fresh.seen, logits(fresh))
        assert fresh.calls["loaded 7"] == 1
        inner = ManySided()
        trainer(enable_checkpointing=True).validate(PrunedModule(inner, HALF), ckpt_path=file)
        assert same(inner.seen, logits(inner, HALF))
        assert inner.calls["loaded 7"] == 1
        weight = inner.model.language_projection.weight
        assert torch.equal(weight, plain.model.language_projection.weight), name
        assert not torch.equal(weight, trained.model.language_projection.weight)


def test_load_from_checkpoint_wraps_and_takes_the_stored_policy(tmp_path: Path) -> None:
    files = tmp_path / "plain.ckpt", tmp_path / "wrapped.ckpt"
    trained = ManySided(rate=0.5)
    trained.model.language_projection.weight.data += 1
    for file, root in zip(files, (trained, PrunedModule(trained, HALF)), strict=True):
        run = trainer(limit_val_batches=1)
        run.validate(root)
        run.save_checkpoint(file)
    loaded = PrunedModule.load_from_checkpoint(files[1], inner=ManySided())
    assert loaded.policy == HALF
    assert loaded.inner.calls["loaded 7"] == 1
    assert torch.equal(loaded.inner.model.language_projection.weight, trained.model.language_projection.weight)
    assert ManySided.load_from_checkpoint(files[1]).hparams["rate"] == 0.5
    with pytest.raises(PolicyError, match="written without PrunedModule"):
        PrunedModule.load_from_checkpoint(files[0], inner=ManySided())
    quarter = HALF.with_keep(0.25)
    assert PrunedModule.load_from_checkpoint(files[0], inner=ManySided(), policy=quarter).policy == quarter


def test_fit_resumes_from_its_own_checkpoint(tmp_path: Path) -> None:
    straight, halted, resumed = (PrunedModule(ManySided(), HALF) for _ in range(3))
    trainer(max_epochs=2).fit(straight)
    run = trainer(max_epochs=1)
    run.fit(halted)
    run.save_checkpoint(tmp_path / "one.ckpt")
    trainer(max_epochs=2).fit(resumed, ckpt_path=str(tmp_path / "one.ckpt"))
    assert all(map(torch.equal, straight.state_dict().values(), resumed.state_dict().values()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda wrapper: pickle.loads(pickle.dumps(wrapper))])
def test_copies_are_independent_and_work(copied: Callable[[PrunedModule], PrunedModule]) -> None:
    wrapper = PrunedModule(ManySided(), HALF)
    other = copied(wrapper)
    assert isinstance(other, PrunedModule)
    assert other.inner is not wrapper.inner
    other.model.language_projection.weight.data += 1
    assert same(trainer().predict(wrapper), logits(wrapper.inner, HALF))
    assert same(trainer().predict(other), logits(other.inner, HALF))
    assert not same(logits(wrapper.inner, HALF), logits(other.inner, HALF))


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


def test_a_module_that_copies_itself_is_copied_inside_the_wrapper() -> None:
    class Copies(ManySided):
        def __deepcopy__(self, memo: dict[int, Any]) -> "Copies":
            return Copies(rate=7.0)

    other = copy.deepcopy(PrunedModule(Copies(), HALF))
    assert isinstance(other, PrunedModule)
    assert other.hparams["rate"] == 7.0


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
