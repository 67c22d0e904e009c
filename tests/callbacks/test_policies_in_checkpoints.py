"""Checkpoints: what ours leave in them, what they bring back, and what nothing of ours may do to them."""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy

from catp_lightning import PolicyError, PrunedModule, PruningPolicy, TokenPruning
from tests.support.footprints import footprint
from tests.support.models import TINY, random_blip2
from tests.support.modules import Answering, by_hand, same
from tests.support.policies import HALF, QUARTER
from tests.support.trainers import STAGES, trainer

GETS = ("TokenPruning", "PrunedModule")


class Trained(Answering):
    """Learns enough in one step for its answers to change."""

    def __init__(self) -> None:
        super().__init__(random_blip2(shape=TINY))
        self.train_dataloader = lambda: self.loader(1)
        self.val_dataloader = self.test_dataloader = self.predict_dataloader = self.loader

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(by: str, policy: Any, module: Answering, *callbacks: Callback, **settings: Any) -> tuple[Trainer, Any]:
    """A Trainer and what to run in it, pruned by the callback or the wrapper."""
    if by == "TokenPruning":
        return trainer(TokenPruning(policy), *callbacks, **settings), module
    return trainer(*callbacks, **settings), PrunedModule(module, policy)


def saved(folder: Path, by: str = "TokenPruning", keep: float = 0.5) -> tuple[Trainer, Path]:
    """One epoch of training, pruned where it validates: its Trainer and its checkpoint."""
    kept = ModelCheckpoint(folder, save_last=True, monitor="val_level")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit, root = run(by, HALF.with_keep(keep), Trained(), kept, max_epochs=1, enable_checkpointing=True)
        fit.fit(root)
    return fit, Path(kept.best_model_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`saved`, once for each kind."""
    return functools.cache(lambda *kind: saved(tmp_path_factory.mktemp("checkpoints"), *kind)[1])


def answers(module: Answering, run: Trainer, root: Any, stage: str, **options: Any) -> list[torch.Tensor]:
    returned = getattr(run, stage)(root, **options)
    return returned if stage == "predict" else module.seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("written", "by", "stage"),
    [
        ("TokenPruning", "TokenPruning", "validate"),
        ("PrunedModule", "TokenPruning", "test"),
        ("TokenPruning", "TokenPruning", "predict"),
        ("TokenPruning", "PrunedModule", "validate"),
        ("PrunedModule", "PrunedModule", "test"),
        ("PrunedModule", "PrunedModule", "predict"),
    ],
)
def test_weights_and_policy_come_from_the_checkpoint_that_is_named(
    written: str, by: str, stage: str, checkpoint: Callable[..., Path]
) -> None:
    file = checkpoint(written, 0.25)
    assert PruningPolicy.from_dict(torch.load(file, weights_only=True)["catp_policy"]) == QUARTER
    module, fresh = Trained(), Trained()
    tester, root = run(by, None, module, enable_checkpointing=True)
    found = answers(module, tester, root, stage, ckpt_path=str(file), weights_only=True)
    assert same(found, by_hand(module, QUARTER))
    assert not same(found, by_hand(fresh, QUARTER))
    module.seen.clear()
    assert same(answers(module, tester, root, stage), found)  # weights stay in the module, and the policy with them


@pytest.mark.parametrize("by", GETS)
def test_a_checkpoint_without_a_policy_takes_away_that_of_the_one_before(
    by: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    content = torch.load(checkpoint(), weights_only=True)
    del content["catp_policy"]
    torch.save(content, tmp_path / "plain.ckpt")
    module = Trained()
    tester, root = run(by, None, module, enable_checkpointing=True)
    answers(module, tester, root, "test", ckpt_path=str(checkpoint()), weights_only=True)
    with pytest.raises(PolicyError, match="policy"):
        tester.test(root, ckpt_path=str(tmp_path / "plain.ckpt"), weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize(("by", "name"), [("TokenPruning", "best"), ("PrunedModule", "last")])
def test_a_trainer_that_has_trained_finds_its_best_and_its_last(by: str, name: str, tmp_path: Path) -> None:
    fit, _ = saved(tmp_path, by)
    module = Trained()
    root: Any = module if by == "TokenPruning" else PrunedModule(module)
    for stage in STAGES:
        module.seen.clear()
        assert same(answers(module, fit, root, stage, ckpt_path=name), by_hand(module, HALF))


@pytest.mark.parametrize("by", GETS)
def test_a_policy_that_is_given_wins_over_the_checkpoint_and_one_warning_says_both(
    by: str, checkpoint: Callable[..., Path]
) -> None:
    file = checkpoint()
    found = []
    for policy in (QUARTER, PruningPolicy("catp", {}, keep=0.5, evidence={"of": "another calibration"})):
        module = Trained()
        tester, root = run(by, policy, module)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert same(answers(module, tester, root, "test", ckpt_path=str(file)), by_hand(module, policy))
        found.append(
            [str(warning.message) for warning in caught if "the one in the checkpoint" in str(warning.message)]
        )
    assert found[1] == []
    assert found[0] == [
        f"{by} was given a policy with keep 0.25; the one in the checkpoint has keep 0.5. The one that was given is "
        "used. To take the checkpoint's, give none."
    ]


@pytest.mark.parametrize("by", GETS)
def test_a_budget_of_ones_own_is_taken_of_the_policy_in_the_checkpoint(
    by: str, checkpoint: Callable[..., Path]
) -> None:
    file = checkpoint()
    module = Trained()
    tester, root = trainer(TokenPruning(keep=3)), module
    if by == "PrunedModule":
        tester, root = trainer(), PrunedModule(module, keep=3)  # type: ignore[assignment]
    found = answers(module, tester, root, "validate", ckpt_path=str(file))
    assert same(found, by_hand(module, HALF.with_keep(3)))


@pytest.mark.slow
@pytest.mark.parametrize("by", GETS)
@pytest.mark.parametrize("stage", ["fit", *STAGES])
def test_without_a_policy_of_either_kind_it_says_what_to_do(by: str, stage: str, tmp_path: Path) -> None:
    module, plain = Trained(), Trained()
    before = footprint(module)
    run_plain = trainer()
    run_plain.validate(plain)
    run_plain.save_checkpoint(tmp_path / "plain.ckpt")
    for options in ({}, {"ckpt_path": str(tmp_path / "plain.ckpt")}):
        if stage == "fit" and options:
            continue  # a checkpoint of an evaluation cannot be trained on
        sanity = 0 if by == "TokenPruning" else 2  # it checks where training starts; the wrapper in its first step
        tester, root = run(by, None, module, max_epochs=1, num_sanity_val_steps=sanity)
        with pytest.raises(PolicyError, match=rf"{by} has no policy: none was given.*run with ckpt_path="):
            getattr(tester, stage)(root, **options)
        assert footprint(module) == before
    assert not module.seen  # it was not even trained for an epoch before


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "text": lambda policy: "catp",
    "another budget": lambda policy: {**policy, "keep": {"share": 7.0}},
    "an unknown method": lambda policy: {**policy, "scorer": "catnip"},
    "nothing": lambda policy: None,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by", "damage"), [*(("TokenPruning", damage) for damage in DAMAGES), ("PrunedModule", "nothing")]
)
def test_a_damaged_policy_in_a_checkpoint_is_told_and_another_can_take_its_place(
    by: str, damage: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    file, contents = tmp_path / "damaged.ckpt", torch.load(checkpoint(), weights_only=True)
    contents["catp_policy"] = DAMAGES[damage](contents["catp_policy"])
    torch.save(contents, file)
    module = Trained()
    before = footprint(module)
    tester, root = run(by, None, module)
    with pytest.raises(PolicyError, match="The policy in the checkpoint, under 'catp_policy', is damaged"):
        tester.test(root, ckpt_path=str(file))
    assert footprint(module) == before
    tester, root = run(by, QUARTER, module)
    with pytest.warns(UserWarning, match=f"{by} uses the policy it was given. The policy in the checkpoint"):
        assert same(answers(module, tester, root, "test", ckpt_path=str(file)), by_hand(module, QUARTER))


def test_a_checkpoint_holds_the_policy_and_nothing_else_of_the_callback_and_loads_without_it(tmp_path: Path) -> None:
    contents = []
    for callbacks in ([], [TokenPruning(HALF)]):
        torch.manual_seed(0)
        fit = trainer(*callbacks, max_epochs=1)
        fit.fit(Trained())
        fit.save_checkpoint(tmp_path / "a.ckpt")
        contents.append(torch.load(tmp_path / "a.ckpt", weights_only=True))
    plain, pruned = contents
    assert PruningPolicy.from_dict(pruned.pop("catp_policy")) == HALF
    assert plain.keys() == pruned.keys()
    assert plain["callbacks"] == pruned["callbacks"] == {}
    assert all(torch.equal(value, pruned["state_dict"][key]) for key, value in plain["state_dict"].items())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer().test(Trained(), ckpt_path=str(tmp_path / "a.ckpt"))
    assert not [warning for warning in caught if "callbacks" in str(warning.message)]


class Saves(Callback):
    """Saves in the middle of validation."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        trainer.save_checkpoint(self.file)


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False], ids=["saved first", "saved last"])
def test_nothing_of_an_open_context_is_in_a_checkpoint_of_the_middle_of_validation(tmp_path: Path, first: bool) -> None:
    contents = []
    for pruning in ([], [TokenPruning(HALF)]):
        torch.manual_seed(0)
        file, module = tmp_path / f"{len(pruning)}.ckpt", Trained()
        callbacks = [Saves(file), *pruning] if first else [*pruning, Saves(file)]
        trainer(*callbacks, max_epochs=1, num_sanity_val_steps=0).fit(module)
        contents.append(torch.load(file, weights_only=True))
    plain, pruned = contents
    assert pruned.keys() - plain.keys() == {"catp_policy"}
    assert list(plain["state_dict"]) == list(pruned["state_dict"])
    assert all(torch.equal(value, pruned["state_dict"][key]) for key, value in plain["state_dict"].items())
    assert plain["callbacks"] == pruned["callbacks"]
    module = Trained()
    trainer(TokenPruning()).validate(module, ckpt_path=str(file))
    assert same(module.seen, by_hand(module, HALF))


@pytest.mark.slow
@pytest.mark.parametrize("by", GETS)
def test_a_run_that_resumes_ends_where_one_without_a_stop_does(by: str, checkpoint: Callable[..., Path]) -> None:
    torch.manual_seed(0)
    straight = Trained()
    whole, root = run(by, HALF, straight, max_epochs=2)
    whole.fit(root)
    file = checkpoint(by)
    module = Trained()
    second, root = run(by, None, module, max_epochs=2)
    second.fit(root, ckpt_path=str(file))
    assert all(map(torch.equal, straight.state_dict().values(), module.state_dict().values()))
    assert same(module.seen[-2:], by_hand(module))


@pytest.mark.slow
@pytest.mark.parametrize(
    "averaging", [lambda: EMAWeightAveraging(decay=0.5), lambda: StochasticWeightAveraging(0.1, 1)]
)
def test_averaged_weights_are_saved_under_the_wrapper_as_beside_the_callback(
    averaging: Callable[[], Callback], tmp_path: Path
) -> None:
    contents = []
    for by in GETS:
        torch.manual_seed(0)
        module = Trained()
        fit, root = run(by, HALF, module, averaging(), max_epochs=3, num_sanity_val_steps=0)
        fit.fit(root)
        fit.save_checkpoint(tmp_path / "a.ckpt")
        contents.append((torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"], module.seen))
    (state, seen), (other, others_seen) = contents
    assert list(state) == list(other)
    assert all(torch.equal(value, other[key]) for key, value in state.items())
    assert same(seen, others_seen)


def test_a_strategy_that_loads_its_checkpoint_late_brings_the_policy_too(
    checkpoint: Callable[..., Path],
) -> None:
    class Late(SingleDeviceStrategy):
        """As those do that shard the model."""

        restore_checkpoint_after_setup = True

    file = checkpoint()
    module = Trained()
    trainer(TokenPruning(), strategy=Late("cpu")).validate(module, ckpt_path=str(file))
    assert same(module.seen, by_hand(module, HALF))
