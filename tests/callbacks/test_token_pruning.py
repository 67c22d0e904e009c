"""TokenPruning with the real Trainer: what it prunes, what it logs, and that it always leaves the model as it was."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser

from catp_lightning.callbacks.calibration import CrossAttentionCalibration
from catp_lightning.callbacks.token_pruning import TokenPruning
from catp_lightning.errors import PolicyError, PruningError
from tests.support.footprints import footprint
from tests.support.modules import Answering, by_hand, same, unpruned
from tests.support.policies import HALF
from tests.support.trainers import trainer


def test_pruning_moves_the_logits_or_the_tests_here_prove_nothing() -> None:
    module = Answering()
    for pruned, full in zip(by_hand(module), unpruned(module), strict=True):
        assert (pruned - full).abs().max() > 1e-2 * full.abs().max()


def test_a_stage_that_was_not_asked_for_runs_unpruned() -> None:
    module = Answering()
    assert same(trainer(TokenPruning(HALF, stages=("test",))).predict(module, module.loader()), unpruned(module))


def test_training_is_untouched_and_validation_inside_fit_is_pruned() -> None:
    torch.manual_seed(0)
    plain, pruned = Answering(), Answering()
    for module, callbacks in ((plain, []), (pruned, [TokenPruning(HALF)])):
        trainer(*callbacks, max_epochs=1, num_sanity_val_steps=0).fit(module, module.loader(1), module.loader())
    assert all(map(torch.equal, plain.state_dict().values(), pruned.state_dict().values()))
    assert torch.equal(plain.seen[0], pruned.seen[0])
    assert same(pruned.seen[1:], by_hand(pruned))
    assert same(plain.seen[1:], unpruned(plain))


@pytest.mark.parametrize("sanity_check", [False, True])
def test_the_sanity_check_is_pruned_only_when_asked(sanity_check: bool) -> None:
    module = Answering()
    expected = by_hand(module) if sanity_check else unpruned(module)
    fit = trainer(TokenPruning(HALF, sanity_check=sanity_check), max_epochs=1, num_sanity_val_steps=2)
    fit.fit(module, module.loader(1), module.loader())
    assert same(module.seen[:2], expected)
    assert same(module.seen[3:], by_hand(module))


class Raises(Callback):
    def __init__(self, hook: str, error: BaseException) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise error

        setattr(self, hook, fail)


@pytest.mark.parametrize("first", [True, False], ids=["neighbour first", "neighbour last"])
@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_batch_end", "on_validation_end", "teardown"])
def test_a_failing_neighbour_leaves_the_model_as_it_was(hook: str, first: bool) -> None:
    module, neighbour = Answering(), Raises(hook, RuntimeError("neighbour"))
    before, plain = footprint(module), unpruned(module)
    pruning = TokenPruning(HALF)
    with pytest.raises(RuntimeError, match="neighbour"):
        trainer(*([neighbour, pruning] if first else [pruning, neighbour])).validate(module, module.loader())
    assert footprint(module) == before
    assert same(unpruned(module), plain)


@pytest.mark.parametrize(
    ("stage", "error"),
    [
        *((stage, RuntimeError("step")) for stage in ("validate", "test", "predict", "fit")),
        ("predict", KeyboardInterrupt()),
    ],
)
def test_an_exception_in_a_step_leaves_the_model_as_it_was(stage: str, error: BaseException) -> None:
    module = Answering()
    before, plain = footprint(module), unpruned(module)

    def fail(batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        assert footprint(module) != before  # it fails while pruned
        raise error

    setattr(module, "validation_step" if stage in ("validate", "fit") else f"{stage}_step", fail)
    loaders = (module.loader(), module.loader()) if stage == "fit" else (module.loader(),)
    run = trainer(TokenPruning(HALF), num_sanity_val_steps=0, max_epochs=1, limit_train_batches=1)
    with pytest.raises((RuntimeError, SystemExit)):
        getattr(run, stage)(module, *loaders)
    assert footprint(module) == before
    if stage != "fit":
        assert same(unpruned(module), plain)


def test_a_neighbour_that_fails_in_its_own_on_exception_leaves_the_model_as_it_was() -> None:
    module, pruning = Answering(), TokenPruning(HALF)
    before = footprint(module)
    neighbours = Raises("on_validation_batch_start", RuntimeError("a")), Raises("on_exception", RuntimeError("b"))
    with pytest.raises(RuntimeError, match="b"):
        trainer(*neighbours, pruning).validate(module, module.loader())
    assert footprint(module) == before
    assert same(trainer(pruning).predict(module, module.loader()), by_hand(module))
    assert footprint(module) == before


def test_each_validation_epoch_counts_anew() -> None:
    module = Answering()
    run = trainer(TokenPruning(HALF), max_epochs=2)
    run.fit(module, module.loader(1), module.loader())
    run.validate(module, module.loader())
    assert run.callback_metrics["catp/keep_share"] == 0.5


@pytest.mark.parametrize("keep", [1.0, 1], ids=["all", "one token"])
def test_compare_logs_the_agreement_with_the_unpruned_model(keep: float) -> None:
    module, policy = Answering(), HALF.with_keep(keep)
    run = trainer(TokenPruning(policy, compare=True))
    run.validate(module, module.loader())
    last = [
        (a[:, -1].argmax(-1) == b[:, -1].argmax(-1))
        for a, b in zip(by_hand(module, policy), unpruned(module), strict=True)
    ]
    assert run.callback_metrics["catp/agreement"] == pytest.approx(torch.cat(last).float().mean().item())
    assert same(module.seen, by_hand(module, policy))
    assert (run.callback_metrics["catp/agreement"] == 1) == isinstance(keep, float)


def test_paths_are_read_at_setup_and_keep_chooses_the_budget(tmp_path: Path) -> None:
    module, callback = Answering(), TokenPruning(tmp_path / "policies", keep=0.25)
    with pytest.raises(PolicyError, match="policies"):
        trainer(callback).validate(module, module.loader())
    for keep in (0.5, 0.25):
        HALF.with_keep(keep).save(tmp_path / "policies" / f"keep-{keep}.json")
    quarter = by_hand(module, HALF.with_keep(0.25))
    assert same(trainer(callback).predict(module, module.loader()), quarter)
    file = HALF.save(tmp_path / "policy.json")
    with pytest.raises(PolicyError, match=r"is for keep=\{'share': 0\.5\}, not 0\.25"):
        trainer(TokenPruning(str(file), keep=0.25)).predict(module, module.loader())
    assert same(trainer(TokenPruning(HALF, keep=0.25)).predict(module, module.loader()), quarter)


def test_fit_without_validation_needs_no_policy(tmp_path: Path) -> None:
    module = Answering()
    trainer(TokenPruning(tmp_path / "later.json"), max_steps=1).fit(module, module.loader())


def test_whoever_watches_validation_metrics_is_told(tmp_path: Path) -> None:
    module = Answering()
    watchers = [EarlyStopping("val_level"), ModelCheckpoint(tmp_path, monitor="val_level")]
    settings: dict[str, Any] = {"max_epochs": 1, "enable_checkpointing": True}
    with pytest.warns(UserWarning, match=r"EarlyStopping \(monitor='val_level'\), ModelCheckpoint"):
        trainer(TokenPruning(HALF), *watchers, **settings).fit(module, module.loader(), module.loader())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(TokenPruning(HALF, stages=("test",)), *watchers, **settings).fit(
            module, module.loader(), module.loader()
        )
        trainer(TokenPruning(HALF), ModelCheckpoint(tmp_path), **settings).fit(module, module.loader(), module.loader())
    assert not [warning for warning in caught if "TokenPruning" in str(warning.message)]


def test_predict_beside_calibration_is_refused_at_setup(tmp_path: Path) -> None:
    module, callback = Answering(), CrossAttentionCalibration(tmp_path / "policy.json")
    with pytest.raises(PruningError, match="leave predict out"):
        trainer(callback, TokenPruning(HALF)).predict(module, module.loader())
    trainer(callback, TokenPruning(HALF)).validate(module, module.loader())


def test_an_epoch_in_which_nothing_was_pruned_is_told_and_logs_no_numbers() -> None:
    module = Answering()
    module.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    run = trainer(TokenPruning(HALF))
    with pytest.warns(UserWarning, match="pruned nothing"):
        run.validate(module, module.loader())
    assert not run.callback_metrics


def test_an_unknown_stage_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'train'"):
        TokenPruning(HALF, stages=("train",))  # type: ignore[arg-type]


def test_a_copy_made_while_pruning_is_outside() -> None:
    module, callback, copies = Answering(), TokenPruning(HALF), []

    class Copies(Callback):
        def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
            copies.append(copy.deepcopy(callback))

    expected = by_hand(module)
    trainer(callback, Copies()).validate(module, module.loader())
    assert same(module.seen, expected)
    copies[0].teardown(trainer(), module, "validate")  # must not leave what only the original entered
    assert same(trainer(copies[0]).predict(module, module.loader()), expected)


def test_it_can_be_sent_to_another_process() -> None:
    module = Answering()
    callback = pickle.loads(pickle.dumps(TokenPruning(HALF, stages=("predict",))))
    assert same(trainer(callback).predict(module, module.loader()), by_hand(module))
    assert callback.stages == ("predict",)


@pytest.mark.parametrize(("keep", "kind"), [("4", int), ("0.25", float), ("1.0", float), ("1", int)])
def test_the_command_line_builds_it_and_tells_tokens_from_shares(tmp_path: Path, keep: str, kind: type) -> None:
    file = HALF.save(tmp_path / "policy.json")
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(TokenPruning, "pruning")
    (tmp_path / "config.yaml").write_text(
        f"pruning:\n  policy: {file}\n  keep: {keep}\n  stages: [validate, predict]\n"
    )
    callback = parser.instantiate_classes(parser.parse_path(str(tmp_path / "config.yaml"))).pruning
    assert str(callback.policy) == str(file)
    assert (callback.keep, type(callback.keep)) == (kind(float(keep)), kind)
    assert callback.stages == ("validate", "predict")
