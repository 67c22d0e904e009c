"""The LLaVA that comes with the package is what its log says, and like the real one where pruning looks."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from catp_lightning.data import shipped
from catp_lightning.data.scenes import EMPTY, Scene, digit_pool, draw_scene

PROMPT = "<image> Question: {} Short answer:"


def scenes(count: int) -> list[Scene]:
    rng, pool = np.random.default_rng(11), digit_pool("test")
    return [draw_scene(rng, pool, 6, 6) for _ in range(count)]


def test_it_is_a_real_llava_with_144_tokens_and_a_cls_in_at_most_8_megabytes() -> None:
    folder = shipped("digits_llava")
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8_000_000
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert type(model) is LlavaForConditionalGeneration
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (model.config.vision_feature_layer, model.config.vision_feature_select_strategy) == (-2, "default")
    (scene,) = scenes(1)
    image = np.stack([scene.image] * 3, -1)
    inputs = processor(images=image, text=PROMPT.format("Is there a 3?"), return_tensors="pt")
    assert (inputs.input_ids == model.config.image_token_id).sum() == 144
    assert torch.allclose(
        inputs.pixel_values[0, 0], torch.from_numpy(scene.image) / 127.5 - 1, atol=1e-6
    )  # not resized
    assert model.model.vision_tower(inputs.pixel_values).last_hidden_state.shape[1] == 145  # [CLS] comes first


@pytest.mark.slow
def test_generate_is_greedy_and_stops_after_one_word_without_being_told_to() -> None:
    folder = shipped("digits_llava")
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    images = [[np.stack([scene.image] * 3, -1)] for scene in scenes(16)]
    texts = [PROMPT.format("How many digits are there?")] * 16
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    output = model.generate(**inputs)
    assert torch.equal(output, model.generate(**inputs, do_sample=False, max_new_tokens=4))
    assert (
        output.shape[1] == inputs.input_ids.shape[1] + 2 and (output[:, -1] == processor.tokenizer.eos_token_id).all()
    )


@pytest.mark.slow
def test_the_cls_whose_features_are_used_looks_at_the_digits() -> None:
    model = AutoModelForImageTextToText.from_pretrained(shipped("digits_llava"), attn_implementation="eager")
    drawn = scenes(40)
    pixels = torch.from_numpy(np.stack([scene.image for scene in drawn])) / 127.5 - 1
    with torch.no_grad():
        output = model.model.vision_tower(pixels[:, None].expand(-1, 3, -1, -1), output_attentions=True)
    attention = output.attentions[-2].mean(1)[:, 0, 1:]  # of the block that makes hidden state -2
    cells = torch.from_numpy(np.stack([scene.grid for scene in drawn]) != EMPTY)
    ink = cells.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    assert ink.float().mean() < 0.1
    assert ((attention * ink).sum(1) / attention.sum(1)).mean() > 0.5
    found = [seen.topk(int(digits.sum())).indices for seen, digits in zip(attention, ink, strict=True)]
    assert np.mean([digits[top].float().mean() for digits, top in zip(ink, found, strict=True)]) > 0.95
