"""The model that comes with the package is what its log says, and calibrating it beats the rule it is named after."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, Blip2ForConditionalGeneration

from catp_lightning import CrossAttentionCalibration, PruningPolicy, TokenPruning, VQAModule
from catp_lightning.data import shipped
from catp_lightning.data.scenes import write_scenes
from catp_lightning.data.vqa import VQADataModule, VQASplit
from tests.support.trainers import trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> VQADataModule:
    def split(name: str, questions: int) -> VQASplit:
        place = write_scenes(tmp_path_factory.mktemp(name), name, questions, seed=7)
        return VQASplit.of_scenes(place)

    model = str(shipped("digits_blip2"))
    return VQADataModule(model, calibration=split("calibration", 256), test=split("test", 200), batch_size=64)


@pytest.mark.slow
def test_it_is_a_real_blip2_with_32_queries_in_at_most_8_megabytes() -> None:
    folder = shipped("digits_blip2")
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8_000_000
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model) is Blip2ForConditionalGeneration and model.config.num_query_tokens == 32
    crossing = [layer for layer in model.qformer.encoder.layer if layer.has_cross_attention]
    assert len(crossing) >= 4 and model.config.qformer_config.num_attention_heads >= 4
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.slow
def test_a_calibrated_policy_agrees_more_with_the_model_than_catp_does(data: VQADataModule, tmp_path: Path) -> None:
    module = VQAModule(str(shipped("digits_blip2")))
    calibration = CrossAttentionCalibration(tmp_path / "policy.json", keep=0.25)
    trainer(calibration).predict(module, data.calibration_dataloader())
    agreement = {}
    for name, policy in {"calibrated": tmp_path / "policy.json", "catp": PruningPolicy(keep=0.25)}.items():
        pruning = TokenPruning(policy, compare=True)
        (figures,) = trainer(pruning).test(module, data, verbose=False)
        assert figures["catp/tokens_kept"] == 8 and figures["catp/keep_share"] == 0.25
        agreement[name] = figures["catp/agreement"]
    assert agreement["calibrated"] > agreement["catp"] + 0.1
