"""Models that no process holds whole: FSDP2 prunes them as the whole ones, and what cannot work there is refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from catp_lightning.callbacks.calibration import CrossAttentionCalibration
from catp_lightning.callbacks.token_pruning import TokenPruning
from catp_lightning.errors import PruningError
from catp_lightning.models import find_family
from catp_lightning.modules.pruned import PrunedModule
from catp_lightning.policy import PruningPolicy
from catp_lightning.pruning import prune
from tests.support.families import ROWS
from tests.support.models import greedily, random_blip2
from tests.support.modules import Generating
from tests.support.several_processes import POLICY, Sample, each
from tests.support.trainers import QUIET, loading


class Sharded(LightningModule):
    """A model whose weights no process holds whole: each attention and each layer is gathered when it runs."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for part in reversed(list(self.net.modules())):
            if type(part).__name__.endswith(("Attention", "Layer")):
                fully_shard(part, mesh=mesh)
        fully_shard(self.net, mesh=mesh)
        register_fsdp_forward_method(self.net, "generate")
        self.kinds = {type(parameter).__name__ for parameter in self.net.parameters()}

    def predict_step(self, batch: Sample, batch_idx: int) -> tuple[Tensor, Tensor]:
        return self.net.generate(**batch, **LONG), self.net(**batch).logits


LONG = greedily(4)


def llava_model(attention: str) -> tuple[Any, Sample]:
    row = next(row for row in ROWS if row.name == "Llava")
    return copy.deepcopy(row.model(torch.float64, attention)), row.inputs([0, 2])


def blip2_model(attention: str) -> tuple[Any, Sample]:
    return random_blip2(dtype=torch.float64, attention=attention, batch=2)


@pytest.mark.parametrize(
    ("make", "scorer", "attention"),
    [
        (blip2_model, "catp", "eager"),
        pytest.param(blip2_model, "catp", "sdpa", marks=pytest.mark.slow),
        pytest.param(llava_model, "fastervlm", "eager", marks=pytest.mark.slow),
        (llava_model, "fastv", "sdpa"),
        pytest.param(llava_model, "fastervlm", "sdpa", marks=pytest.mark.slow),
        pytest.param(llava_model, "fastv", "eager", marks=pytest.mark.slow),
    ],
)
def test_a_model_sharded_by_fsdp2_is_pruned_as_the_whole_one(
    tmp_path: Path, make: Callable[[str], tuple[Any, Sample]], scorer: str, attention: str
) -> None:
    whole, inputs = make(attention)
    described = find_family(whole).describe()
    policy = PruningPolicy(scorer=scorer, keep=0.5, model=described)
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    other = {**other, "input_ids": other["input_ids"].flip(0), "attention_mask": other["attention_mask"].flip(0)}
    other["pixel_values"] = other["pixel_values"] * 1.5
    batches = [inputs, other]

    def work(rank: int) -> Any:
        module, pruning = Sharded(make(attention)[0]), TokenPruning(policy)
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        data: Any = loading(batches)
        trainer = Trainer(callbacks=[pruning], devices=2, strategy=strategy, **QUIET)
        [(answers, logits)] = trainer.predict(module, data)
        return answers, logits, pruning.figures, module.kinds, find_family(module).describe()

    with torch.no_grad(), prune(whole, policy):
        expected = [(whole.generate(**batch, **LONG), whole(**batch).logits) for batch in batches]
    with torch.no_grad():
        full = [whole(**batch).logits for batch in batches]
    for rank, (answers, logits, figures, kinds, description) in enumerate(each(tmp_path, work, 2)):
        assert kinds == {"DTensor"}
        assert torch.equal(answers, expected[rank][0])
        torch.testing.assert_close(logits, expected[rank][1])
        assert (logits - full[rank]).abs().max() > 1e-2 * full[rank].abs().max()
        assert 0 < figures["catp/keep_share"] < 1
        assert description == described


@pytest.mark.parametrize(
    ("kind", "name"), [(FSDPStrategy, "FSDPStrategy"), (ModelParallelStrategy, "ModelParallelStrategy")]
)
def test_calibration_of_a_sharded_model_is_refused(tmp_path: Path, kind: type, name: str) -> None:
    with pytest.raises(
        PruningError, match=rf"CrossAttentionCalibration.*{name}.*own batches again.*one device or under DDP"
    ):
        under(kind, CrossAttentionCalibration(tmp_path / "policy.json"))
    under(kind, TokenPruning(POLICY))


def test_deepspeed_is_refused_with_the_reason(tmp_path: Path) -> None:
    for callback in (TokenPruning(POLICY), CrossAttentionCalibration(tmp_path / "policy.json")):
        with pytest.raises(
            PruningError, match=rf"{type(callback).__name__}.*DeepSpeedStrategy.*ZeRO.*ModelParallelStrategy"
        ):
            under(DeepSpeedStrategy, callback)
    under(DeepSpeedStrategy, TokenPruning(POLICY, stages=("validate", "test")))  # it does nothing in predict
    wrapper = PrunedModule(Generating(), POLICY)
    wrapper.trainer = trainer_under(DeepSpeedStrategy)
    with pytest.raises(PruningError, match=r"PrunedModule.*DeepSpeedStrategy.*ZeRO"):
        wrapper.setup("predict")


def test_both_packages_of_lightning_are_known() -> None:
    others = pytest.importorskip("pytorch_lightning.strategies")
    with pytest.raises(PruningError, match=r"DeepSpeedStrategy.*ZeRO"):
        under(others.DeepSpeedStrategy, TokenPruning(POLICY))


def trainer_under(kind: type) -> Trainer:
    """A trainer of this strategy, which need not be able to run here: what is refused is refused before it would."""
    trainer = Trainer(**QUIET)
    trainer._accelerator_connector.strategy = kind.__new__(kind)
    return trainer


def under(kind: type, callback: Callback) -> None:
    callback.setup(trainer_under(kind), Generating(), "predict")
