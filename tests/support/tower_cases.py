"""Models whose vision towers are observed, and what each image and frame of theirs shows where it is alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tests.support.families import BY_NAME
from tests.support.hybrid_families import HYBRID
from tests.support.newer_families import NEWER
from tests.support.oracles import Inputs
from tests.support.rows import Row
from tests.support.samples import Sample
from tests.support.tower_oracle import Alone, alone

ROWS = {**{row.name: row for row in (*NEWER, *HYBRID)}, **BY_NAME}


def encoder(tower: Any) -> Sequence[nn.Module]:
    return list(getattr(tower, "vision_model", tower).encoder.layers)


def but_one(tower: Any) -> Sequence[nn.Module]:
    return encoder(tower)[:-1]


@dataclass(frozen=True)
class Case:
    """Row of the matrix, and where its tower's blocks are.

    Attributes:
        row: name of the row.
        tower: name of the tower.
        blocks: returns the blocks of the tower that lead to the features.
        has_class: True if the first row of the tower is [CLS].
        video: name of the tower that reads videos, if it is another.
        whole: the blocks that attend to the whole image; None: all.
    """

    row: str
    tower: str = "vision_tower"
    blocks: Callable[[Any], Sequence[nn.Module]] = encoder
    has_class: bool = False
    video: str = ""
    whole: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        return self.row


QWEN = (
    *("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "Qwen3-VL, videos", "Qwen3-VL-MoE", "Qwen2.5-Omni", "Qwen3-Omni-MoE"),
    *("GLM-4V", "GLM-4V, videos", "GLM-4.6V", "GLM-OCR", "Cosmos3-Omni", "EXAONE-4.5", "HyperCLOVAX-V2", "Qwen3.5"),
)
WINDOWS = ("Qwen2.5-VL", "Qwen2.5-Omni", "EXAONE-4.5", "HyperCLOVAX-V2")
PIXTRAL = ("Mistral3", "Pixtral", "LightOnOCR")
CASES = [
    *(
        Case(
            name,
            "vision_model" if name == "HyperCLOVAX-V2" else "visual",
            lambda tower: list(tower.blocks),
            whole=(1, 3) if name in WINDOWS else None,
        )
        for name in QWEN
    ),
    Case("InternVL", blocks=lambda tower: list(tower.encoder.layer), has_class=True),
    Case("Gemma3"),
    Case("PaliGemma"),
    Case("SmolVLM", "vision_model"),
    Case("Idefics3", "vision_model"),
    *(
        Case(
            name,
            "vision_encoder" if name == "LightOnOCR" else "vision_tower",
            lambda tower: list(tower.transformer.layers),
        )
        for name in PIXTRAL
    ),
    Case("Llava", blocks=but_one, has_class=True),
    Case("VipLlava", has_class=True),
    Case("LlavaNextVideo", blocks=but_one, has_class=True),
    Case("VideoLlava", "image_tower", but_one, True, "video_tower"),
]


def apart(sample: Sample) -> Iterator[Sample]:
    """Yield the images and frames of a sample, each as if it were alone."""
    for image in sample.images:
        own = dict(image.tensors)
        if "pixel_values_videos" not in own:
            if "pixel_values" in own:  # not a sound, nor a frame whose tensors came with the video's first
                yield replace(sample, images=[image])
            continue
        pixels, grid = own["pixel_values_videos"], own.get("video_grid_thw")
        frames = int(grid[0]) if grid is not None else len(pixels)
        for frame in pixels.chunk(frames):
            one = {} if grid is None else {"video_grid_thw": grid.clone().index_fill_(0, torch.tensor([0]), 1)}
            yield replace(sample, images=[replace(image, tensors={"pixel_values_videos": frame, **one})])


def tensors(row: Row, sample: Sample) -> Inputs:
    """The pixels of a sample, and what says how large they are."""
    text = {"input_ids": torch.tensor([sample.ids]), "attention_mask": torch.ones(1, len(sample.ids))}
    joined = row.join([sample], text)
    sizes = (
        "pixel_values",
        "pixel_values_images",
        "pixel_values_videos",
        "image_grid_thw",
        "video_grid_thw",
        "image_sizes",
    )
    return {
        name: joined[name].double() if joined[name].is_floating_point() else joined[name]
        for name in sizes
        if name in joined
    }


def expected(case: Case, row: Row) -> Iterator[Alone]:
    """What the images and frames of the row show, each alone, in the order of their tokens."""
    for sample in row.samples():
        for one in apart(sample):
            inputs = tensors(row, one)
            video = "pixel_values_videos" in inputs
            if case.row == "LlavaNextVideo" and not video:
                continue  # crops are held against hand computation elsewhere
            tower = case.video if video and case.video else case.tower
            yield alone(row.model(attention="sdpa"), tower, case.blocks, inputs, case.has_class, case.whole)
