"""The Llama-3.2-Vision that comes with the package has tiles like the real one, and is what its log says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, MllamaForConditionalGeneration

import catp_lightning.data
from catp_lightning import PruningPolicy, prune
from catp_lightning.data.scenes import digit_pool, draw_scene
from tests.support.oracles import cache_of
from tests.support.paths import ROOT

FOLDER = Path(catp_lightning.data.__file__).parent / "digits_mllama"
TILES = {(3, 3): (1, 1), (3, 6): (1, 2), (6, 3): (2, 1), (6, 6): (2, 2)}  # of a grid of cells: high and wide
PROMPT = "<|image|>Question: {} Short answer:"


@pytest.fixture(scope="module")
def model() -> MllamaForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(FOLDER).eval()


def test_it_is_a_real_mllama_with_4_cross_attention_layers_in_at_most_8_megabytes(
    model: MllamaForConditionalGeneration,
) -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 8_000_000
    assert type(model) is MllamaForConditionalGeneration
    text = model.config.text_config
    assert len(text.cross_attention_layers) >= 4 and text.num_attention_heads >= 4
    for index in text.cross_attention_layers:
        gate = model.model.language_model.layers[index].cross_attn_attn_gate
        assert gate.tanh().abs() > 0.05, "every one of them passes something of the image on"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("grid", TILES)
def test_a_scene_becomes_exactly_its_tiles(grid: tuple[int, int]) -> None:
    high, wide = TILES[grid]
    processor = AutoProcessor.from_pretrained(FOLDER)
    scene = draw_scene(np.random.default_rng(1), digit_pool("test"), *grid)
    image = np.stack([scene.image] * 3, -1)
    inputs = processor(images=[[image]], text=[PROMPT.format("Is there a 3?")], return_tensors="pt")
    assert inputs["aspect_ratio_mask"].sum() == high * wide
    ratios = AutoModelForImageTextToText.from_pretrained(FOLDER).config.vision_config.supported_aspect_ratios
    assert ratios[inputs["aspect_ratio_ids"].item() - 1] == [high, wide]
    assert inputs["cross_attention_mask"][0, -1, 0].tolist() == [1] * high * wide + [0] * (4 - high * wide)
    assert inputs["pixel_values"].shape == (1, 1, 4, 3, 48, 48)
    pixels = torch.from_numpy(scene.image).float() / 127.5 - 1
    for tile in range(4):
        row, column = tile // wide * 48, tile % wide * 48
        expected = pixels[row : row + 48, column : column + 48] if tile < high * wide else torch.zeros(48, 48)
        torch.testing.assert_close(inputs["pixel_values"][0, 0, tile, 0], expected, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_it_was_trained_on_what_processor_and_model_make_of_a_question(
    model: MllamaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "training")
    import mllama
    import mllama_batches

    processor = AutoProcessor.from_pretrained(FOLDER)
    prompt = PROMPT.replace("<|image|>", "<|image|><|begin_of_text|>")
    batches = mllama.Batches(processor.tokenizer, prompt, digit_pool("train"), 0)
    scenes = mllama_batches.draw(batches, 2, mllama.ASKED)
    packed = mllama_batches.pack(scenes.text, processor.tokenizer.pad_token_id, processor.tokenizer.eos_token_id)
    with torch.no_grad():
        states = mllama.image_states(model, scenes.vision)
        hidden = mllama.hidden_states(model, states, scenes.vision["aspect_ratio_mask"], packed)
    answers = (packed.targets >= 0) & (packed.targets != processor.tokenizer.eos_token_id)
    logits = model.lm_head(hidden[answers]).unflatten(0, (len(scenes.drawn), len(mllama.ASKED)))
    for scene, rows, expected in zip(scenes.drawn, scenes.text, logits, strict=True):
        image = np.stack([scene.image] * 3, -1)
        for row, question in zip(rows, expected, strict=True):
            text = "<|image|>" + " ".join(processor.tokenizer.convert_ids_to_tokens(row[3:-1]))
            inputs = processor(images=[[image]], text=[text], return_tensors="pt")
            assert inputs["input_ids"][0].tolist() == row[:-1]
            with torch.no_grad():
                torch.testing.assert_close(model(**inputs).logits[0, -1], question, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_at_keep_1_it_stores_the_tiles_an_image_has_and_answers_as_before(
    model: MllamaForConditionalGeneration,
) -> None:
    processor, rng = AutoProcessor.from_pretrained(FOLDER), np.random.default_rng(5)
    for grid, (high, wide) in TILES.items():
        images = [[np.stack([draw_scene(rng, digit_pool("test"), *grid).image] * 3, -1)] for _ in range(3)]
        texts = [
            PROMPT.format(question) for question in ("Is there a 3?", "How many digits are there?", "Is there a 5?")
        ]
        inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
        plain = model.generate(**inputs, return_dict_in_generate=True, output_logits=True)
        with prune(model, PruningPolicy(keep=1.0)) as pruning:
            output = model.generate(**inputs, return_dict_in_generate=True, output_logits=True)
        for layer in model.config.text_config.cross_attention_layers:
            full, held = cache_of(plain).layers[layer], cache_of(output).layers[layer]
            assert held.keys.nbytes * 4 == full.keys.nbytes * high * wide and held.values.nbytes == held.keys.nbytes
        assert torch.equal(output.sequences, plain.sequences) and pruning.keep.sum(1).tolist() == [high * wide * 37] * 3
        for mine, theirs in zip(output.logits, plain.logits, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def test_its_own_generate_is_greedy_and_stops_after_the_answer(model: MllamaForConditionalGeneration) -> None:
    processor = AutoProcessor.from_pretrained(FOLDER)
    scene = draw_scene(np.random.default_rng(2), digit_pool("test"), 3, 6)
    text = [PROMPT.format("How many digits are there?")]
    inputs = processor(images=[[np.stack([scene.image] * 3, -1)]], text=text, return_tensors="pt")
    output = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(output[0]) == str((scene.grid >= 0).sum())
    assert output.tolist()[1:] == [processor.tokenizer.eos_token_id]
    assert not model.generation_config.do_sample
