"""Checkpoints and copies of PrunedModule: either class reads those of the other."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from catp_lightning.errors import PolicyError
from catp_lightning.modules.pruned import PrunedModule
from catp_lightning.policy import PruningPolicy
from tests.support.many_sided import ManySided, logits
from tests.support.modules import same
from tests.support.policies import HALF
from tests.support.trainers import trainer


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


def test_a_module_that_copies_itself_is_copied_inside_the_wrapper() -> None:
    class Copies(ManySided):
        def __deepcopy__(self, memo: dict[int, Any]) -> "Copies":
            return Copies(rate=7.0)

    other = copy.deepcopy(PrunedModule(Copies(), HALF))
    assert isinstance(other, PrunedModule)
    assert other.hparams["rate"] == 7.0
