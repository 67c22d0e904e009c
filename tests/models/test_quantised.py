"""Quantised models, where torchao and bitsandbytes are installed: `make test-quantised` runs these tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Blip2ForConditionalGeneration

from catp_lightning.calibration.identity import model_fingerprint
from tests.support.adapted_models import check_calibrates, check_dropping_equals_masking
from tests.support.footprints import footprint
from tests.support.models import random_blip2


def int8_by_torchao(part: str) -> tuple[Any, dict[str, Tensor]]:
    quantization = pytest.importorskip("torchao.quantization")
    model, inputs = random_blip2()
    quantization.quantize_(model.get_submodule(part) if part else model, quantization.Int8WeightOnlyConfig())
    return model, inputs


def by_bitsandbytes(bits: int, path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Parts that are too narrow for blocks of 64 stay as they are."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    narrow = ["vision_model", "qformer", "language_projection", "lm_head"]
    config = {
        8: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"]),
        4: BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=narrow,
        ),
    }[bits]
    model, inputs = random_blip2()
    model.save_pretrained(path / f"model-{bits}")
    loaded = Blip2ForConditionalGeneration.from_pretrained(
        path / f"model-{bits}", quantization_config=config, device_map="cpu", dtype=torch.float32
    ).eval()
    try:
        with torch.no_grad():
            loaded(**inputs)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"bitsandbytes does not run the unpruned model on this CPU: {error}")
    return loaded, inputs


QUANTISED: dict[str, Callable[[Path], tuple[Any, dict[str, Tensor]]]] = {
    "torchao, language model": lambda path: int8_by_torchao("language_model"),
    "torchao, vision tower": lambda path: int8_by_torchao("vision_model"),
    "torchao, everything": lambda path: int8_by_torchao(""),
    "bitsandbytes, 8 bits": lambda path: by_bitsandbytes(8, path),
    "bitsandbytes, 4 bits": lambda path: by_bitsandbytes(4, path),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", QUANTISED)
def test_dropping_equals_masking_on_the_quantised_model_itself(how: str, tmp_path: Path) -> None:
    model, inputs = QUANTISED[how](tmp_path)
    before = footprint(model)
    plain, _ = random_blip2()
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits, plain(**inputs).logits), "it must be quantised"
    check_dropping_equals_masking(model, inputs)
    assert footprint(model) == before


@pytest.mark.slow
@pytest.mark.parametrize("how", QUANTISED)
def test_a_quantised_model_is_calibrated_and_its_predictions_stay_the_usual_ones(how: str, tmp_path: Path) -> None:
    check_calibrates(QUANTISED[how](tmp_path)[0], tmp_path)


def codes(layer: Any) -> Tensor:
    return layer.weight.qdata if hasattr(layer.weight, "qdata") else layer.weight.data


def scales(layer: Any) -> Tensor:
    if hasattr(layer.weight, "qdata"):
        return layer.weight.scale
    return layer.state.SCB if hasattr(layer, "state") else layer.weight.quant_state.absmax


@pytest.mark.slow
@pytest.mark.parametrize("how", [how for how in QUANTISED if how != "torchao, vision tower"])
def test_the_fingerprint_of_quantised_weights_changes_with_one_code_and_with_one_scale(
    how: str, tmp_path: Path
) -> None:
    model, inputs = QUANTISED[how](tmp_path)
    with torch.no_grad():
        logits, first = model(**inputs).logits, model_fingerprint(model)
        assert torch.equal(model(**inputs).logits, logits), "it only looks"
    assert model_fingerprint(model) == first
    for part in (codes, scales):
        values = part(model.language_model.model.decoder.layers[0].fc1).view(-1)
        before = values[3].clone()
        values[3] += 1
        assert model_fingerprint(model) != first, part.__name__
        values[3] = before
        assert model_fingerprint(model) == first
