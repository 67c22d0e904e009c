"""Every precision a Trainer has: pruned as by hand under the same precision, exact within it, scored in float32."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from catp_lightning import PruningPolicy, TokenPruning, prune
from catp_lightning.prompt.attention import attention_map
from tests.support.calibrations import calibrate, data
from tests.support.families import BY_NAME
from tests.support.footprints import footprint
from tests.support.modules import Generating
from tests.support.trainers import QUIET, loading

CASES = {
    "Blip2-OPT": PruningPolicy(scorer="catp", keep=0.5),
    "Llava": PruningPolicy(scorer="fastervlm", keep=0.5),
    "Llava, inside the decoder": PruningPolicy(scorer="fastv", keep=0.5),
    "Mllama": PruningPolicy(scorer="trimmed-llama", keep=0.5),
}
PRECISIONS = ("32-true", "bf16-true", "16-true", "64-true", "bf16-mixed", "16-mixed")
# Of the largest logit. Half precision rounds a hundred times over on the way: it differs from run to run of other
# shapes, unpruned as well.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


class Predicting(L.LightningModule):
    """Records what a step ran under."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.row = BY_NAME[name.partition(",")[0]]
        self.model = copy.deepcopy(self.row.model(torch.float32))  # precisions convert it in place
        self.inference: list[bool] = []
        self.autocast: list[bool] = []

    def loader(self) -> DataLoader[dict[str, Tensor]]:
        inputs = self.row.oracle.forward_inputs(self.row.inputs(dtype=torch.float32))
        return loading([inputs])

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.inference.append(torch.is_inference_mode_enabled())
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        return self.model(**batch).logits


def check(name: str, precision: Any, inference_mode: bool) -> None:
    module, policy = Predicting(name), CASES[name]
    oracle, (exact_inputs,) = module.row.oracle, module.loader()
    with torch.no_grad():
        module.model(**exact_inputs)  # at its first call transformers sets hooks of its own, which stay
    before = footprint(module.model)
    with torch.no_grad(), prune(module, policy) as full_precision:
        module.model(**exact_inputs)
    pruning = TokenPruning(policy)
    trainer = L.Trainer(callbacks=[pruning], precision=precision, inference_mode=inference_mode, **QUIET)
    (predicted,) = trainer.predict(module, module.loader())
    assert module.inference == [inference_mode] and module.autocast == ["mixed" in precision]
    plugin = trainer.precision_plugin
    (inputs,) = map(plugin.convert_input, module.loader())
    with torch.no_grad(), plugin.predict_step_context():
        with prune(module, policy) as by_hand:
            assert torch.equal(module.model(**inputs).logits, predicted)
        keep, scores = by_hand.keep, by_hand.scores
        assert keep is not None and scores is not None
        full = module.model(**inputs).logits
        if policy.scorer != "fastv":  # masked at the entry, which is where the others drop
            with oracle.masked(module.model, inputs, keep):
                masked = module.model(**inputs).logits
            rows, scale = oracle.compared(inputs, keep), full.abs().max().item()
            assert (predicted[rows] - masked[rows]).abs().max() < TOLERANCE[predicted.dtype] * scale
            assert (full[rows] - masked[rows]).abs().max() > 0.2 * scale, "pruning must move logits"
    assert predicted.isfinite().all() and all(map(torch.tensor, pruning.figures.values()))
    assert scores.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert torch.equal(keep.sum(1), full_precision.keep.sum(1)), "as many tokens as the budget says"
    close = _is_close_to_the_threshold(full_precision.scores, full_precision.keep, predicted.dtype)
    assert torch.equal(keep | close, full_precision.keep | close), "others may stay only where scores are all but tied"
    assert footprint(module.model) == before


def _is_close_to_the_threshold(scores: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
    """Tokens whose score is so near to the other side's that rounding on the way may swap them: bool [B, T]."""
    there = scores.isfinite()
    spread = scores.masked_fill(~there, 0).amax(1) - scores.masked_fill(~there, torch.inf).amin(1)
    least = scores.masked_fill(~keep, torch.inf).amin(1, keepdim=True)
    most = scores.masked_fill(keep | ~there, -torch.inf).amax(1, keepdim=True)
    near = TOLERANCE[dtype] * spread[:, None]
    return there & (scores <= most.maximum(least) + near) & (scores >= most.minimum(least) - near)


@pytest.mark.parametrize(
    ("name", "precision", "inference_mode"),
    [
        ("Blip2-OPT", "bf16-mixed", True),
        ("Blip2-OPT", "16-true", False),
        ("Llava", "bf16-true", True),
        ("Llava, inside the decoder", "bf16-mixed", False),
        ("Mllama", "bf16-mixed", True),
        ("Mllama", "64-true", False),
    ],
)
def test_pruned_predictions_are_those_by_hand_and_exact_within_the_precision(
    name: str, precision: str, inference_mode: bool
) -> None:
    check(name, precision, inference_mode)


@pytest.mark.slow
@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CASES)
def test_every_precision_prunes_every_kind_of_model_as_by_hand(name: str, precision: str, inference_mode: bool) -> None:
    check(name, precision, inference_mode)


def test_lightning_runs_16_mixed_as_bf16_mixed_on_a_cpu_and_says_so() -> None:
    with pytest.warns(UserWarning, match="Using `precision='bf16-mixed'` instead"):
        check("Blip2-OPT", "16-mixed", True)


@pytest.mark.parametrize("name", [name for name in CASES if "," not in name])
def test_autocast_to_float16_prunes_and_scores_are_float32(name: str) -> None:
    module, policy = Predicting(name), CASES[name]
    (inputs,) = module.loader()
    with torch.no_grad(), prune(module, policy) as exact:
        module.model(**inputs)
    with torch.no_grad(), torch.autocast("cpu", torch.float16), prune(module, policy) as pruning:
        logits = module.model(**inputs).logits
    assert logits.dtype == torch.float16 and logits.isfinite().all()
    assert pruning.scores.dtype == torch.float32 and torch.equal(pruning.keep.sum(1), exact.keep.sum(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_is_observed_in_float32_under_autocast(dtype: torch.dtype) -> None:
    query, key = torch.randn(2, 4, 3, 16), torch.randn(2, 4, 5, 16)
    exact = attention_map(query, key, None, 0.25)
    with torch.autocast("cpu", dtype):
        observed = attention_map(query, key, None, 0.25)
    assert observed.dtype == torch.float32 and torch.equal(observed, exact)


def calibrated(path: Path, module: L.LightningModule, batches: Any, **settings: Any) -> PruningPolicy:
    return calibrate(module, batches, path, **settings).policies[0]


def finite(value: Any) -> bool:
    """Whether all numbers in what JSON holds are."""
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or bool(torch.tensor(value).isfinite())


@pytest.mark.slow
def test_a_calibration_in_mixed_precision_measures_what_full_precision_measures(tmp_path: Path) -> None:
    half, full = (
        calibrated(tmp_path / name, Generating(), data(24, 8), precision=name) for name in ("bf16-mixed", "32-true")
    )
    assert finite(half.to_dict()) and half.evidence["samples"] == full.evidence["samples"]
    one, other = (
        {row["name"]: row["choose"]["divergence"] for row in policy.evidence["candidates"]} for policy in (half, full)
    )
    shared = sorted(one.keys() & other.keys() & {"catp", "cross-attention", "l2-norm", "stride", "position"})
    assert len(shared) > 2
    for name in shared:
        assert one[name] == pytest.approx(other[name], rel=0.25), name


@pytest.mark.slow
@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["Llava", "Mllama"])
def test_every_precision_calibrates_to_a_finite_policy_that_prunes(
    tmp_path: Path, name: str, precision: str, inference_mode: bool
) -> None:
    module = Predicting(name)
    (inputs,) = module.loader()
    batches = [{**inputs, "pixel_values": torch.randn_like(inputs["pixel_values"])} for _ in range(9)]
    settings: dict[str, Any] = {"precision": precision, "inference_mode": inference_mode}
    policy = calibrated(tmp_path / "policy.json", module, batches, **settings)
    assert finite(policy.to_dict())
    trainer = L.Trainer(callbacks=[TokenPruning(policy)], **QUIET, **settings)
    with pytest.warns(UserWarning, match="images that the policy was calibrated on"):
        predicted = trainer.predict(module, loading(batches))
    assert all(logits.isfinite().all() for logits in predicted)
