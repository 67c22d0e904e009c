"""TokenPruning under the settings of a Trainer: limits, loaders, loggers, tuners, determinism."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner

from catp_lightning import PruningError, PruningPolicy, TokenPruning, prune
from catp_lightning.methods.scorers import SCORERS
from tests.support.footprints import footprint
from tests.support.loops import Several, Still, answers
from tests.support.modules import Answering, by_hand, same, two_images, unpruned
from tests.support.policies import HALF
from tests.support.trainers import STAGES, loading, trainer

SETTINGS: dict[str, tuple[dict[str, Any], int]] = {
    # of one training batch and two of validation in each of two epochs: how many of validation are left
    "plain": ({}, 4),
    "limit_val_batches=1": ({"limit_val_batches": 1}, 2),
    "limit_val_batches=0.5": ({"limit_val_batches": 0.5}, 2),
    "limit_val_batches=0": ({"limit_val_batches": 0}, 0),
    "limit_train_batches=0": ({"limit_train_batches": 0}, 0),
    "fast_dev_run": ({"fast_dev_run": True}, 1),
    "overfit_batches": ({"overfit_batches": 1}, 2),
    "val_check_interval": ({"val_check_interval": 1.0}, 4),
    "check_val_every_n_epoch": ({"check_val_every_n_epoch": 2}, 2),
    "reload_dataloaders": ({"reload_dataloaders_every_n_epochs": 1}, 4),
    "accumulate_grad_batches": ({"accumulate_grad_batches": 2}, 4),
    "gradient_clip_val": ({"gradient_clip_val": 0.5}, 4),
    "profiler": ({"profiler": "simple"}, 4),
    "inference_mode=False": ({"inference_mode": False}, 4),
    "detect_anomaly": ({"detect_anomaly": True}, 4),
    "barebones": ({"barebones": True, "logger": None, "enable_checkpointing": None, "enable_progress_bar": None,
                   "enable_model_summary": None}, 4),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_under_every_setting_of_the_trainer_training_is_plain_and_validation_pruned(name: str) -> None:
    settings, count = SETTINGS[name]
    module = Still()
    expected, plain, before = by_hand(module), unpruned(module), footprint(module)
    trained: list[bool] = []
    module.training_step = lambda batch, batch_idx: (  # type: ignore[method-assign]
        trained.append(footprint(module) == before) or module.model(**batch).logits.mean()
    )
    pruning = TokenPruning(HALF)
    run = trainer(pruning, **{"max_epochs": 2, "num_sanity_val_steps": 0, **settings})
    run.fit(module, module.loader(1), module.loader())
    assert all(trained)
    assert len(trained) == {"limit_train_batches=0": 0, "fast_dev_run": 1}.get(name, 2)
    batches = 1 if settings.get("limit_val_batches") in (1, 0.5) or name in ("fast_dev_run", "overfit_batches") else 2
    assert same(module.seen, (expected[:batches] * 2)[:count])
    assert bool(pruning.figures) == (count > 0)
    assert footprint(module) == before
    assert same(unpruned(module), plain)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("limit", "count"), [(0, 0), (0.5, 1)])
def test_a_limit_of_batches_is_kept(stage: str, limit: float, count: int) -> None:
    module = Still()
    name = {"validate": "val"}.get(stage, stage)
    expected, before = by_hand(module), footprint(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = answers(module, stage, TokenPruning(HALF), **{f"limit_{name}_batches": limit})
    assert same(found or [], expected[:count])
    assert footprint(module) == before


@pytest.mark.parametrize("stage", STAGES)
def test_figures_are_means_over_all_loaders(stage: str, tmp_path: Path) -> None:
    module = Several()
    one = {name: value[:1] for name, value in module.inputs.items()}
    batches = [module.inputs, one, two_images(module.inputs)]  # 4 visual tokens a sample, and 8 of the last
    loaders = [loading(batches[:2]), loading(batches[2:])]
    policy = HALF.with_keep(3)
    logger, pruning = CSVLogger(tmp_path), TokenPruning(policy)
    with torch.no_grad(), prune(module.model, policy):
        expected = [module.model(**batch).logits for batch in batches]
    found = answers(module, stage, pruning, loaders=loaders, logger=logger)
    assert same([*found[0], *found[1]] if stage == "predict" else found, expected)
    figures = pytest.approx({"catp/tokens_kept": (3 * 4 + 6) / 5, "catp/keep_share": 3 / 4})
    assert pruning.figures == figures
    logger.save()
    header, line = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    logged = dict(zip(header.split(","), line.split(","), strict=True))
    assert {name: float(value) for name, value in logged.items() if name.startswith("catp/")} == figures


@pytest.mark.slow
def test_every_logger_is_told_of_a_prediction_and_the_console_where_there_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, loggers = Answering(), [CSVLogger(tmp_path, name="one"), CSVLogger(tmp_path, name="two")]
    answers(module, "predict", TokenPruning(HALF), logger=loggers)
    for logger in loggers:
        logger.save()
        assert "catp/keep_share" in (Path(logger.log_dir) / "metrics.csv").read_text()
    with caplog.at_level("INFO"):
        answers(module, "predict", TokenPruning(HALF))
    assert "catp/tokens_kept 4, catp/keep_share 0.5" in caplog.text


@pytest.mark.parametrize("stage", ["fit", *(pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES)])
def test_a_tuner_leaves_no_hook_and_finds_the_size_it_finds_without(stage: str, tmp_path: Path) -> None:
    sizes = []
    for callbacks in ([], [TokenPruning(HALF)]):
        module = Still()
        before = footprint(module)
        for loader in ("train", "val", "test", "predict"):
            setattr(module, f"{loader}_dataloader", module.samples)
        run = trainer(*callbacks, max_epochs=1, default_root_dir=tmp_path)
        sizes.append(Tuner(run).scale_batch_size(module, method=stage, max_trials=1, steps_per_trial=1))
        assert footprint(module) == before
        if stage != "fit":
            found = answers(module, stage, *callbacks)
            assert same(found[-2:], by_hand(module) if callbacks else unpruned(module))
    assert sizes[0] == sizes[1] == 2


@pytest.fixture
def deterministic() -> Iterator[Callable[[], None]]:
    """torch then refuses operations without a deterministic implementation, and fills new memory with NaN."""
    yield lambda: torch.use_deterministic_algorithms(True)
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_deterministic_algorithms_suffice_for_every_method_and_nothing_reads_memory_it_did_not_write(
    deterministic: Callable[[], None],
) -> None:
    module, found = Answering(), {}
    policies = {name: PruningPolicy(scorer=name, keep=0.5) for name in SCORERS}
    for attempt in range(2):
        for name, policy in policies.items():
            try:
                found[name, attempt] = by_hand(module, policy)
            except PruningError as error:  # of methods that this model has not what they read
                found[name, attempt] = [torch.tensor(len(str(error)))]
        deterministic()
    assert sum(logits[0].dim() > 0 for logits in found.values()) >= 2 * 10
    for name in policies:
        assert same(found[name, 0], found[name, 1]), name
    assert same(answers(module, "validate", TokenPruning(HALF), deterministic=True), by_hand(module))


def test_checkpointed_gradients_are_those_of_the_plain_ones_and_validation_between_is_pruned() -> None:
    found = []
    for checkpointed in (False, True):
        module = Answering()
        module.model.train()  # which gradient checkpointing needs
        getattr(module.model, f"gradient_checkpointing_{'enable' if checkpointed else 'disable'}")()
        torch.manual_seed(0)
        trainer(TokenPruning(HALF), max_epochs=2, num_sanity_val_steps=0).fit(module, module.loader(1), module.loader())
        assert module.model.training
        found.append((module.seen, module.state_dict()))
    assert same(found[0][0], found[1][0])
    assert same(found[1][0][-2:], by_hand(module))
    assert all(map(torch.equal, found[0][1].values(), found[1][1].values()))


def test_manual_optimization_is_untouched() -> None:
    class Manual(Answering):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:  # type: ignore[override]
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    manual, automatic = Manual(), Answering()
    for module in (manual, automatic):
        trainer(TokenPruning(HALF), max_epochs=1).fit(module, module.loader(1), module.loader())
    assert same(manual.seen, automatic.seen)
    assert same(manual.seen[-2:], by_hand(manual))
