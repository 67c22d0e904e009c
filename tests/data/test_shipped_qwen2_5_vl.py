"""The Qwen2.5-VL that comes with the package is like the real one where pruning looks: sizes, windows, depth."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLForConditionalGeneration

from catp_lightning.data import GRIDS, PROMPTS, shipped
from catp_lightning.data.scenes import ASK, CELL, KINDS, Scene, digit_pool, draw_scene
from tests.support.paths import ROOT
from tests.support.processors import needs_processors_of_qwen

pytestmark = needs_processors_of_qwen

NAME = "digits_qwen2_5_vl"
PROMPT = PROMPTS[NAME]


@pytest.fixture(scope="module")
def model() -> Qwen2_5_VLForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(shipped(NAME))


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(shipped(NAME))


def scenes(count: int, rows: int, columns: int) -> list[Scene]:
    rng, pool = np.random.default_rng(11), digit_pool("test")
    return [draw_scene(rng, pool, rows, columns) for _ in range(count)]


def inputs_of(processor, drawn: list[Scene], questions: list[str]):
    images = [[np.stack([scene.image] * 3, -1)] for scene in drawn]
    return processor(images=images, text=[PROMPT.format(q) for q in questions], padding=True, return_tensors="pt")


def test_its_log_says_at_least_95_percent_on_2000_unseen_questions_after_less_than_90_minutes() -> None:
    lines = [json.loads(line) for line in (ROOT / "training/qwen2_5_vl.jsonl").read_text().splitlines()]
    assert lines[-1]["test_questions"] == 2000 and lines[-1]["test"]["all"] >= 0.95
    assert lines[-1]["seconds"] < 90 * 60


def test_it_is_a_real_qwen2_5_vl_of_12_layers_with_windows_in_at_most_8_megabytes(model) -> None:
    assert sum(file.stat().st_size for file in shipped(NAME).iterdir()) <= 8_000_000
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert len(model.model.language_model.layers) >= 12
    blocks = set(range(len(model.model.visual.blocks)))
    assert set() < set(model.config.vision_config.fullatt_block_indexes) < blocks


@pytest.mark.parametrize(("rows", "columns"), GRIDS[NAME])
def test_scenes_keep_their_size_and_get_a_token_for_every_8_by_8_pixels_at_its_row_and_column(
    model, processor, rows: int, columns: int
) -> None:
    (scene,) = scenes(1, rows, columns)
    inputs = inputs_of(processor, [scene], [f"Which digit is in row {rows} column {columns}?"])
    high, wide = rows * CELL // 8, columns * CELL // 8
    assert inputs.image_grid_thw.tolist() == [[1, 2 * high, 2 * wide]]
    image = inputs.input_ids[0] == model.config.image_token_id
    assert int(image.sum()) == high * wide and 36 <= high * wide <= 400
    assert processor.tokenizer.unk_token_id not in inputs.input_ids  # "10" is a word of its own
    patches = inputs.pixel_values.view(high, wide, 2, 2, 3, 2, 4, 4)[:, :, :, :, 0, 1]
    pixels = patches.permute(0, 2, 4, 1, 3, 5).reshape(rows * CELL, columns * CELL)
    assert torch.allclose(pixels, torch.from_numpy(scene.image) / 127.5 - 1, atol=1e-6)
    positions, _ = model.model.get_rope_index(inputs.input_ids, inputs.mm_token_type_ids, inputs.image_grid_thw)
    at = positions[:, 0, image] - positions[:, 0, image][:, :1]
    assert torch.equal(at, torch.stack([torch.zeros(high * wide), *torch.ones(high, wide).nonzero().T]).long())
    assert int(positions[0, 0, image.nonzero()[-1] + 1]) == int(positions[0, 0, image][0]) + max(high, wide)


@pytest.mark.slow
def test_generate_is_greedy_and_stops_after_one_word_without_being_told_to(model, processor) -> None:
    drawn = [*scenes(4, 3, 6), *scenes(4, 6, 4)]
    inputs = inputs_of(processor, drawn, ["How many digits are there?"] * 8)
    output = model.generate(**inputs)
    assert torch.equal(output, model.generate(**inputs, do_sample=False, max_new_tokens=4))
    assert (
        output.shape[1] == inputs.input_ids.shape[1] + 2 and (output[:, -1] == processor.tokenizer.eos_token_id).all()
    )


@pytest.mark.slow
def test_answers_need_the_image_in_the_middle_layers_and_not_in_the_last_as_in_large_models(model, processor) -> None:
    drawn, rng = scenes(40, 3, 6), np.random.default_rng(5)
    asked = [ASK[KINDS[number % len(KINDS)]](rng, scene.grid) for number, scene in enumerate(drawn)]
    inputs = inputs_of(processor, drawn, [question.text for question in asked])
    expected = torch.tensor(processor.tokenizer.convert_tokens_to_ids([question.answer for question in asked]))
    right = {layer: int((answers_blind_from(model, inputs, layer) == expected).sum()) for layer in (0, 3, 7, 11, 12)}
    assert max(right[0], right[3]) <= 16 and right[12] >= 36
    assert right[3] + 8 <= right[7] <= right[12] - 6  # some is read before the seventh layer, some after
    assert right[11] >= right[12] - 2


def answers_blind_from(model, inputs, layer: int) -> Tensor:
    """Return the first token of each answer where text does not see the image from decoder layer `layer` on."""
    image = inputs.input_ids == model.config.image_token_id
    seen = inputs.attention_mask.bool()[:, None, None] & torch.ones(image.shape[1], image.shape[1]).tril().bool()
    blind = {"attention_mask": seen & ~(image[:, None, None] & ~image[:, None, :, None])}
    handles = [
        part.register_forward_pre_hook(lambda module, args, kwargs: (args, {**kwargs, **blind}), with_kwargs=True)
        for part in model.model.language_model.layers[layer:]
    ]
    try:
        with torch.no_grad():
            return model(**inputs).logits[:, -1].argmax(-1)
    finally:
        for handle in handles:
            handle.remove()
