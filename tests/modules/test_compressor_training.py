"""CompressorTraining trains a small network on a frozen model's own answers, and its policy does what was trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from catp_lightning import PolicyError, PruningError, PruningPolicy, TokenPruning, VQAModule
from catp_lightning.data.vqa import VQADataModule
from catp_lightning.modules.compressor import CompressorTraining
from tests.support.compressors import COMPRESSORS
from tests.support.quick import quick
from tests.support.tiny_vqa import build_model, opt_config, save_model, scenes, t5_config
from tests.support.trainers import trainer

ALL = (("quecc", 2), ("flashsloth", 2), ("dyvte", None))
WIDTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"), opt_config())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, folder: str) -> VQADataModule:
    found = VQADataModule(folder, val=scenes(tmp_path_factory.mktemp("scenes"), 24), batch_size=8)
    found.setup("validate")
    return found


def answering(folder: str) -> VQAModule:
    return VQAModule(folder, generation={"max_new_tokens": 3})


def training(folder: str, name: str, tokens: int | None, **settings: Any) -> CompressorTraining:
    return CompressorTraining(answering(folder), name, tokens, **{"width": WIDTH, "learning_rate": 0.01, **settings})


def answers(module: VQAModule, data: VQADataModule, policy: PruningPolicy | None = None) -> list[str]:
    callbacks = [] if policy is None else [TokenPruning(policy)]
    batches = trainer(*callbacks).predict(module, data.val_dataloader())
    return [one["answer"] for batch in batches or [] for one in batch]


class Losses(Callback):
    """Mean loss of each epoch."""

    def __init__(self) -> None:
        self.each: list[list[float]] = []

    def on_train_epoch_start(self, *args: Any) -> None:
        self.each.append([])

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.each[-1].append(float(outputs["loss"]))

    @property
    def means(self) -> list[float]:
        return [sum(losses) / len(losses) for losses in self.each]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tokens"), ALL)
def test_the_loss_falls_and_the_model_stays_what_it_is_to_the_last_bit(
    name: str, tokens: int | None, folder: str, data: VQADataModule
) -> None:
    learner, losses = training(folder, name, tokens), Losses()
    model = learner.module.model
    next(iter(model.parameters())).requires_grad_(False)  # the user's own choice
    before = {key: value.clone() for key, value in model.state_dict().items()}
    required = [part.requires_grad for part in model.parameters()]
    start = {key: value.clone() for key, value in learner.state_dict().items()}
    trainer(losses, max_epochs=12).fit(learner, data.val_dataloader())
    assert losses.means[-1] < 0.8 * losses.means[0], losses.means
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [part.requires_grad for part in model.parameters()] == required
    assert all(part.grad is None for part in model.parameters()) and not any(part.training for part in model.modules())
    assert all(not torch.equal(value, start[key]) for key, value in learner.state_dict().items()), "all weights learn"


@pytest.mark.parametrize("name", quick(COMPRESSORS, {"quecc"}))
def test_what_is_trained_is_what_the_policy_does(name: str, folder: str, data: VQADataModule, tmp_path: Path) -> None:
    learner = training(folder, name, 2)
    running = trainer(max_epochs=2)
    running.fit(learner, data.val_dataloader())
    policy = PruningPolicy.load(learner.policy().save(tmp_path / "policy.json"))
    assert policy == learner.policy() and policy.keep == 2
    learner.load_state_dict({key: value.half().float() for key, value in learner.state_dict().items()})
    (found,) = trainer().validate(learner, data.val_dataloader(), verbose=False)
    module = answering(folder)  # another module, as elsewhere
    full, short = answers(module, data), answers(module, data, policy)
    same = sum(one == other for one, other in zip(full, short, strict=True)) / len(full)
    assert 0 < same < 1, "or this proves little"
    assert found["val/agreement"] == pytest.approx(same) and found["val/loss"] > 0


@pytest.mark.slow
def test_a_checkpoint_holds_the_compressors_weights_alone_and_gives_the_policy_again(
    folder: str, data: VQADataModule, tmp_path: Path
) -> None:
    learner, saves = training(folder, "quecc", 2), ModelCheckpoint(tmp_path, save_last=True)
    trainer(saves, max_epochs=1, enable_checkpointing=True).fit(learner, data.val_dataloader())
    saved = torch.load(saves.last_model_path, weights_only=True)
    assert saved["state_dict"].keys() == dict(learner.network.items()).keys()
    loaded = CompressorTraining.load_from_checkpoint(saves.last_model_path, module=answering(folder))
    assert loaded.policy() == learner.policy()
    resumed = training(folder, "quecc", 2)
    trainer(max_epochs=1).fit(resumed, data.val_dataloader(), ckpt_path=saves.last_model_path)
    assert resumed.policy() == learner.policy(), "nothing was left to train"
    with pytest.raises(RuntimeError, match="size mismatch"):
        training(folder, "quecc", 2, width=12).load_state_dict(saved["state_dict"])


@pytest.mark.slow
def test_a_training_is_the_same_twice_and_another_seed_gives_other_weights(folder: str, data: VQADataModule) -> None:
    found = []
    for seed in (0, 0, 1):
        learner = training(folder, "flashsloth", 2, seed=seed)
        trainer(max_epochs=1).fit(learner, data.val_dataloader())
        found.append(learner.policy())
    assert found[0] == found[1] != found[2]


@pytest.mark.slow
def test_a_share_of_the_tokens_sets_the_threshold_at_which_they_leave(folder: str, data: VQADataModule) -> None:
    learner = training(folder, "dyvte", None)
    with pytest.raises(PolicyError, match="of which there are 0"):
        learner.policy(keep=0.75)
    trainer(max_epochs=3).fit(learner, data.val_dataloader())
    module, read = answering(folder), []
    for keep in (0.55, 0.75, 0.95):
        (logged,) = trainer(TokenPruning(learner.policy(keep=keep))).validate(module, data, verbose=False)
        read.append(logged["catp/tokens_per_layer"])
    assert read == sorted(read) and read[0] < read[-1]
    for keep, tokens in zip((0.55, 0.75, 0.95), read, strict=True):
        assert tokens / 4 <= keep + 0.1, "the network has moved on since the samples of its last epoch"


def test_what_cannot_be_trained_is_refused_before_anything_runs(folder: str, tmp_path: Path) -> None:
    module = answering(folder)
    for arguments, says in (
        ({"compressor": "queue"}, "There is no compressor 'queue'; known are dyvte, flashsloth, quecc"),
        ({"compressor": "quecc"}, "tokens is None; 'quecc' writes a number of tokens an image"),
        ({"tokens": 0.5}, "tokens is 0.5; 'quecc' writes a number"),
        ({"tokens": 0}, "tokens is 0"),
        ({"compressor": "flashsloth", "tokens": 1}, "a region and a query take at least 2"),
        ({"compressor": "dyvte", "tokens": 4}, "lets all visual tokens leave, and policy"),
        ({"tokens": 2, "width": 6}, "width is 6; it is a multiple of 4"),
        ({"tokens": 2, "width": 100_000}, "would take .* MiB, and a policy has at most 4. Give a smaller width"),
    ):
        with pytest.raises(PolicyError, match=says):
            CompressorTraining(module, **arguments)
    encoder = VQAModule(build_model(t5_config()), processor=folder)
    with pytest.raises(PruningError, match="reads them by encoder"):
        CompressorTraining(encoder, "quecc", 2)


def test_a_step_that_shows_no_image_is_refused(folder: str, data: VQADataModule) -> None:
    learner = training(folder, "quecc", 2)
    learner.module.predict_step = lambda batch, batch_idx: None  # type: ignore[method-assign,assignment]
    with pytest.raises(PruningError, match="asked the model nothing about images"):
        trainer(max_epochs=1).fit(learner, data.val_dataloader())
    assert all(part.requires_grad for part in learner.module.model.parameters()), "given back as it was"


def test_its_policy_is_json_of_plain_types(folder: str) -> None:
    policy = training(folder, "quecc", 2).policy()
    assert PruningPolicy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    assert len(repr(policy)) < 500
