"""Frames as the videos of Qwen2.5-VL and LLaVA-OneVision, whose video processors need torchvision."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from catp_lightning import PruningPolicy, prune
from catp_lightning.data import shipped
from catp_lightning.data.benchmarks import BenchmarkDataModule
from catp_lightning.errors import DataError
from tests.support.benchmark_videos import mvbench

pytest.importorskip("torchvision", reason="transformers reads videos with torchvision; make test-lmms has it")
pytestmark = pytest.mark.slow

SIZE = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}


def qwen(folder: Path) -> str:
    """The processor of the shipped Qwen2.5-VL as one that takes videos."""
    old = hf.AutoProcessor.from_pretrained(shipped("digits_qwen2_5_vl"))
    videos = hf.Qwen2VLVideoProcessor(patch_size=4, merge_size=2, temporal_patch_size=2, size=SIZE)
    hf.Qwen2_5_VLProcessor(old.image_processor, old.tokenizer, videos).save_pretrained(folder)
    return str(folder)


def onevision(folder: Path) -> str:
    """A processor of LLaVA-OneVision with the tokenizer of the shipped LLaVA."""
    tokenizer = hf.AutoProcessor.from_pretrained(shipped("digits_llava")).tokenizer
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    images = hf.LlavaOnevisionImageProcessor(size={"height": 24, "width": 24}, image_grid_pinpoints=[[24, 24]])
    videos = hf.LlavaOnevisionVideoProcessor(size={"height": 24, "width": 24})
    hf.LlavaOnevisionProcessor(
        images, tokenizer, videos, num_image_tokens=9, vision_feature_select_strategy="full"
    ).save_pretrained(folder)
    return str(folder)


def batch_of(folder: Path, processor: str, prompt: str, frames: int) -> dict[str, Any]:
    data = BenchmarkDataModule(processor, test=mvbench(folder, frames), prompt=prompt, batch_size=4)
    return next(iter(data.test_dataloader()))


@pytest.mark.parametrize(
    ("write", "around"), [(qwen, "<|vision_start|>{}<|vision_end|>"), (onevision, "{}")], ids=["qwen", "onevision"]
)
def test_a_video_is_given_to_the_processor_as_one(write: Callable[[Path], str], around: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "processor")
    processor = hf.AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    place = around.format(processor.video_token)
    batch = batch_of(tmp_path, folder, f"{place} Question: {{}} Short answer:", frames=4)
    dataset = BenchmarkDataModule(folder, test=mvbench(tmp_path, 4)).test_dataloader().dataset
    expected = processor(
        videos=[dataset[number]["clip"].frames for number in range(4)],
        text=[f"{place} Question: {dataset[number]['question']} Short answer:" for number in range(4)],
        padding=True,
        do_sample_frames=False,
        return_tensors="pt",
    )
    assert set(batch["inputs"]) == set(expected) and "pixel_values_videos" in expected
    for key in ("input_ids", "attention_mask", "pixel_values_videos"):
        torch.testing.assert_close(batch["inputs"][key], expected[key], msg=key)


def test_seconds_between_frames_are_those_of_the_part_that_was_sampled(tmp_path: Path) -> None:
    place = "<|vision_start|><|video_pad|><|vision_end|>"
    batch = batch_of(tmp_path, qwen(tmp_path / "processor"), f"{place} Question: {{}} Short answer:", frames=4)
    # Four frames stand for 4, 4, 4 and 8 at 3 a second, and two are joined into one.
    seconds = torch.as_tensor(batch["inputs"]["second_per_grid_ts"])
    totals = torch.tensor([4, 4, 4, 8])
    torch.testing.assert_close(seconds.double(), (2 * totals / 4 / 3).double())


def test_tokens_of_videos_are_pruned(tmp_path: Path) -> None:
    place = "<|vision_start|><|video_pad|><|vision_end|>"
    batch = batch_of(tmp_path, qwen(tmp_path / "processor"), f"{place} Question: {{}} Short answer:", frames=4)
    model = hf.AutoModelForImageTextToText.from_pretrained(shipped("digits_qwen2_5_vl")).eval()
    with prune(model, PruningPolicy("l2-norm", keep=0.25)) as pruning:
        model.generate(**batch["inputs"], max_new_tokens=2)
    tokens = (batch["inputs"]["input_ids"] == model.config.video_token_id).sum(1)
    frames = 2  # two and two of the four are joined
    assert pruning.keep.sum(1).tolist() == [frames * -(-int(number) // frames // 4) for number in tokens]


def test_a_prompt_without_a_place_for_the_video_names_the_video_token(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no place for the frames.*write its video token '<\|video_pad\|>' there"):
        batch_of(tmp_path, qwen(tmp_path / "processor"), "{}", frames=4)
