"""CrossAttentionCalibration leaves predictions and model as they are, and chooses by figures that are what they say."""

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from catp_lightning import PolicyError, PruningError, PruningPolicy, prune
from catp_lightning.calibration.split import part_of
from catp_lightning.callbacks.calibration import CrossAttentionCalibration
from tests.support.calibrations import calibrate, data, figures, images_of
from tests.support.footprints import footprint
from tests.support.models import SHORT, faint_blip2
from tests.support.modules import Forwarding, Generating
from tests.support.small_calibrations import QUICKEST
from tests.support.trainers import loading, trainer

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.mark.parametrize("settings", [SHORT, {**SHORT, "num_beams": 2}], ids=["greedy", "beams"])
def test_predictions_stay_the_usual_ones_and_the_model_what_it_was(tmp_path: Path, settings: dict[str, Any]) -> None:
    module, batches = Generating(settings=settings), data(24, 8)
    before = footprint(module.net)
    expected = [module.net.generate(**batch, **settings) for batch in batches]
    callback = CrossAttentionCalibration(tmp_path / "policy.json", scorer="catp", settings=QUICKEST)
    predictions = trainer(callback).predict(module, loading(batches))
    assert all(torch.equal(a, b) for a, b in zip(predictions, expected, strict=True))
    assert footprint(module.net) == before
    policy = PruningPolicy.load(tmp_path / "policy.json")
    assert policy == callback.policies[0] and policy.model["visual_tokens"] == 8
    with prune(module, policy) as pruning:
        module.net(**batches[0])
    assert pruning.keep.sum(1).tolist() == [4] * 8


@pytest.mark.slow
def test_the_policy_is_the_candidate_with_the_least_divergence_and_says_if_it_is_a_control(tmp_path: Path) -> None:
    callback = calibrate(Generating(), data(32, 32), tmp_path, keep=[0.5, 0.25, 2], calibration=QUICKEST)
    assert [policy.keep for policy in callback.policies] == [0.5, 0.25, 2]
    for policy in callback.policies:
        rows = policy.evidence["candidates"]
        assert rows == sorted(
            rows, key=lambda row: (-row["choose"]["samples"], row["choose"]["divergence"], row["name"])
        )
        assert policy.evidence["chosen"] == rows[0]["name"] and policy.evidence["control"] == rows[0]["control"]
        assert PruningPolicy.load(tmp_path, keep=policy.keep) == policy
        controls = {row["name"] for row in rows if row["control"]}
        assert controls >= {
            "random",
            "stride",
            "l2-norm",
            "position",
            "diversity of outputs",
            "diversity of cross-attention",
        }
        assert {"catp", "catp layer 0", "catp layer 1", "self-attention"} <= {row["name"] for row in rows} - controls
    assert sorted(file.name for file in tmp_path.glob("*.json")) == ["keep-0.25.json", "keep-0.5.json", "keep-2.json"]
    assert not list(tmp_path.parent.glob("*.safetensors")), "nothing is left to resume"


@pytest.mark.slow
def test_batches_and_order_do_not_matter(tmp_path: Path) -> None:
    module = Generating(faint_blip2(dtype=torch.float64))
    one = calibrate(module, data(24, 24, torch.float64), tmp_path / "a.json", calibration=QUICKEST).policies[0]
    many = calibrate(module, data(24, 5, torch.float64)[::-1], tmp_path / "b.json", calibration=QUICKEST).policies[0]
    assert one.evidence["chosen"] == many.evidence["chosen"]
    for row in one.evidence["candidates"]:
        other = figures(many, row["name"])
        assert row["choose"]["divergence"] == pytest.approx(other["choose"]["divergence"], rel=1e-9)
        assert row["choose"]["agreement"] == other["choose"]["agreement"]
        assert (row["check"] or {}).get("agreement") == (other["check"] or {}).get("agreement")
    assert one.evidence["fitted"] == many.evidence["fitted"] and one.scorer_args == many.scorer_args


@pytest.mark.slow
def test_a_step_that_only_calls_forward_is_calibrated_by_its_next_token(tmp_path: Path) -> None:
    module, batches = Forwarding(faint_blip2(dtype=torch.float64)), data(24, 8, torch.float64)
    policy = calibrate(module, batches, tmp_path / "p.json", calibration=replace(QUICKEST, first_round=32)).policies[0]
    same, part = [], []
    with torch.no_grad():
        for batch in batches:
            full = module.net(**batch).logits[:, -1].argmax(-1)
            with prune(module, PruningPolicy(scorer="l2-norm", keep=0.5)):
                same.append(module.net(**batch).logits[:, -1].argmax(-1) == full)
            part.append(part_of(images_of([batch])))
    expected = torch.cat(same)[torch.cat(part) == 0].double().mean().item()
    assert figures(policy, "l2-norm")["choose"]["agreement"] == pytest.approx(expected)


@pytest.mark.slow
def test_what_cannot_be_calibrated_is_refused_and_no_file_is_written(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"samples in every part of its split, got \{'learn': "):
        calibrate(Generating(), data(1, 1), tmp_path / "p.json")
    with pytest.raises(PruningError, match="do_sample=True"):
        calibrate(Generating(settings={**SHORT, "do_sample": True}), data(4, 4), tmp_path / "p.json")
    sampling = Generating(settings={"generation_config": GenerationConfig(max_new_tokens=4)})
    sampling.net.language_model.generation_config.do_sample = True  # as many checkpoints have it
    with pytest.raises(PruningError, match="do_sample=True"):
        calibrate(sampling, data(4, 4), tmp_path / "p.json")
    with pytest.raises(PolicyError, match="a file, but several budgets"):
        CrossAttentionCalibration("policy.json", keep=[0.5, 0.25])
    with pytest.raises(PolicyError, match=r"keep is 1\.5"):
        CrossAttentionCalibration("policy.json", keep=1.5)
    with pytest.raises(PolicyError, match="several different ones"):
        calibrate(Generating(), data(4, 4), tmp_path, keep=[0.5, 0.5])

    class Inner(Generating):
        def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            embeds = self.net.get_input_embeddings()(batch["input_ids"])
            self.net.vision_model(batch["pixel_values"])
            features = self.net.get_image_features(batch["pixel_values"], return_dict=True)
            return self.net.language_model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits * bool(
                features
            )

    with pytest.raises(PruningError, match="1 prompts to the language model but got 0 answers"):
        calibrate(Inner(), data(4, 4), tmp_path / "p.json")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_calibration_leaves_the_model_and_the_old_policy(tmp_path: Path) -> None:
    class Failing(Generating):
        def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            if batch_idx == 1:
                raise RuntimeError("planted")
            return super().predict_step(batch, batch_idx)

    module = Failing()
    before, old = footprint(module.net), PruningPolicy(keep=3).save(tmp_path / "p.json").read_text()
    with pytest.raises(RuntimeError, match="planted"):
        calibrate(module, data(24, 8), tmp_path / "p.json")
    assert footprint(module.net) == before and (tmp_path / "p.json").read_text() == old


@pytest.mark.slow
def test_bfloat16_calibrates_with_finite_figures(tmp_path: Path) -> None:
    module, batches = Generating(), data(16, 16)
    policy = calibrate(module, batches, tmp_path / "p.json", calibration=QUICKEST, precision="bf16-mixed").policies[0]
    assert policy.evidence["candidates"][-1]["choose"]["divergence"] < float("inf")
    module, batches = Generating(faint_blip2(dtype=torch.bfloat16)), data(16, 16, torch.bfloat16)
    true = calibrate(module, batches, tmp_path / "q.json", calibration=QUICKEST).policies[0]
    assert true.evidence["candidates"][0]["choose"]["divergence"] >= -1e-3


@pytest.mark.parametrize("size", [20, pytest.param(1, marks=pytest.mark.slow)])
def test_samples_whose_answer_is_no_number_are_left_out_of_a_calibration_and_counted(size: int, tmp_path: Path) -> None:
    batches = data(40, size)
    for row in (3, 27):
        batches[row // size]["pixel_values"][row % size, :, :4] = float("nan")
    with pytest.warns(UserWarning, match="2 samples were left out, to which the unpruned model's own answer is not a"):
        policy = calibrate(Forwarding(), batches, tmp_path / "p.json", keep=4, calibration=QUICKEST).policies[0]
    assert sum(policy.evidence["samples"].values()) == 38
    assert math.isfinite(policy.evidence["candidates"][0]["choose"]["divergence"])
    for batch in batches:
        batch["pixel_values"][:] = float("nan")
    with pytest.raises(PolicyError, match=r"got \{'learn': 0, 'check': 0\}.* 40 samples were left out"):
        calibrate(Forwarding(), batches, tmp_path / "q.json", calibration=QUICKEST)


@pytest.mark.slow
def test_a_folder_that_is_calibrated_anew_for_fewer_budgets_says_what_is_left_of_before(tmp_path: Path) -> None:
    module, folder = Generating(), tmp_path / "policies"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(held keep|different calibrations)")
        calibrate(module, data(24, 12), folder, keep=[0.5, 0.25], calibration=QUICKEST)
        old = PruningPolicy.load(folder, keep=0.25)
        assert PruningPolicy.load(folder, keep=0.5).evidence["retention"] == old.evidence["retention"]
    with pytest.warns(UserWarning, match=r"held keep-0\.25\.json before, which this calibration did not measure"):
        new = calibrate(module, data(24, 12)[::-1], folder, keep=[0.5], calibration=QUICKEST).policies[0]
    with pytest.warns(UserWarning, match=r"different calibrations: keep-0\.25\.json, which is used, .*keep-0\.5\.json"):
        assert PruningPolicy.load(folder, keep=0.25) == old, "nothing that was measured is deleted"
    with pytest.warns(UserWarning, match=r"different calibrations: keep-0\.5\.json, which is used"):
        assert PruningPolicy.load(folder, keep=0.5) == new
    (folder / "keep-0.25.json").unlink()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*different calibrations")
        assert PruningPolicy.load(folder) == new
