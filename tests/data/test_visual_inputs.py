"""Frames of videos in batches: as several images for one model, as a video for another."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from catp_lightning import PruningPolicy, VQAModule, prune
from catp_lightning.data import PROMPTS, shipped
from catp_lightning.data.benchmarks import BenchmarkDataModule
from catp_lightning.errors import DataError
from tests.support.benchmark_videos import mvbench
from tests.support.trainers import trainer

FRAMES = {
    "digits_llava": "{frames:<image>}",
    "digits_mllama": "{frames:<|image|>}",
    "digits_qwen2_5_vl": "{frames:<|vision_start|><|image_pad|><|vision_end|>}",
}


def batch_of(name: str, folder: Path, prompt: str, frames: int) -> dict[str, Any]:
    data = BenchmarkDataModule(str(shipped(name)), test=mvbench(folder, frames), prompt=prompt, batch_size=4)
    return next(iter(data.test_dataloader()))


@pytest.mark.parametrize("name", FRAMES)
def test_each_frame_is_an_image_of_its_own_in_the_prompt(name: str, tmp_path: Path) -> None:
    batch = batch_of(name, tmp_path, f"{FRAMES[name]} Question: {{}} Short answer:", frames=3)
    processor = AutoProcessor.from_pretrained(shipped(name))
    processor.tokenizer.padding_side = "left"
    dataset = BenchmarkDataModule(str(shipped(name)), test=mvbench(tmp_path, 3)).test_dataloader().dataset
    one = FRAMES[name].removeprefix("{frames:").removesuffix("}")
    expected = processor(
        images=[dataset[number]["clip"].frames for number in range(4)],
        text=[f"{one * 3} Question: {dataset[number]['question']} Short answer:" for number in range(4)],
        padding=True,
        return_tensors="pt",
    )
    assert set(batch["inputs"]) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(batch["inputs"][key], value, msg=key)
    assert batch["image_ids"].tolist() == [0, 0, 1, 2] and batch["metric"] == "mvbench"


@pytest.mark.parametrize("name", FRAMES)
def test_tokens_of_all_frames_are_pruned(name: str, tmp_path: Path) -> None:
    batch = batch_of(name, tmp_path, f"{FRAMES[name]} Question: {{}} Short answer:", frames=3)
    model = AutoModelForImageTextToText.from_pretrained(shipped(name)).eval()
    with prune(model, PruningPolicy("l2-norm", keep=0.25)) as pruning:
        answers = model.generate(**batch["inputs"], max_new_tokens=2)
    assert len(answers) == 4
    single = batch_of(name, tmp_path, f"{FRAMES[name]} Question: {{}} Short answer:", frames=1)
    with prune(model, PruningPolicy("l2-norm", keep=1.0)) as whole:
        model.generate(**single["inputs"], max_new_tokens=2)
    assert pruning.keep.sum(1).tolist() == [3 * -(-number // 4) for number in whole.keep.sum(1).tolist()]


def test_figures_are_logged_under_a_trainer(tmp_path: Path) -> None:
    prompt = "{frames:<image>} Question: {} Short answer:"
    data = BenchmarkDataModule(str(shipped("digits_llava")), val=mvbench(tmp_path, 2), prompt=prompt, batch_size=2)
    module = VQAModule(str(shipped("digits_llava")), generation={"max_new_tokens": 2})
    (logged,) = trainer().validate(module, data, verbose=False)
    names = ("action_sequence_accuracy", "moving_count_accuracy", "episodic_reasoning_accuracy", "accuracy")
    assert set(logged) == {f"val/mvbench_{name}" for name in names}


def test_a_prompt_without_a_place_for_frames_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no place for the frames of a video\. Write \{frames:<image>\} where they go"):
        batch_of("digits_llava", tmp_path, PROMPTS["digits_llava"], frames=2)
    assert batch_of("digits_llava", tmp_path, PROMPTS["digits_llava"], frames=1)["metric"] == "mvbench"


def test_several_frames_for_a_model_of_one_image_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Blip2Processor takes one image for each question, and a video has 2 frames"):
        batch_of("digits_blip2", tmp_path, PROMPTS["digits_blip2"], frames=2)
    assert len(batch_of("digits_blip2", tmp_path, PROMPTS["digits_blip2"], frames=1)["inputs"]["pixel_values"]) == 4


def test_frames_that_a_processor_cannot_take_are_described(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"question 0, .*, and video 0, 2 frames of \(32, 24\) pixels, in prompt="):
        batch_of("digits_llava", tmp_path, "{frames:<image> <image>} {}", frames=2)
