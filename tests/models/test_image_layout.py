"""Which placeholder is of which image or frame, held against a loop that walks through prompts by hand."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import pytest
import torch
from torch import Tensor

from catp_lightning import PruningPolicy, prune
from catp_lightning.models import find_family
from catp_lightning.models.layout import Layout
from catp_lightning.models.placeholder import Placeholder
from catp_lightning.prompt.call import ModelCall
from catp_lightning.prompt.prompt import DecoderPrompt
from tests.support.families import ROWS
from tests.support.matrix import MORE
from tests.support.oracles import IMAGE, VIDEO, visual_columns
from tests.support.picture_families import PICTURED
from tests.support.rows import Row
from tests.support.samples import Image

SIZED = [row for row in ROWS if row.name in ("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "Mistral3", "Pixtral")]
LAID_OUT = [*SIZED, *MORE]
ONE_SIZE = [*PICTURED, *(row for row in MORE if row.name in ("GLM-4V, videos", "Granite-Docling"))]
PIXELS = {"pixel_values", "pixel_values_videos", "small"}


@dataclass
class Prompt:
    """What a family reads of a prompt."""

    arguments: ModelCall
    ids: Tensor


@dataclass
class Own:
    """An image, or a frame: the sample it is of, its tokens, its pixels."""

    sample: int
    tokens: int
    pixels: Tensor


def by_hand(row: Row) -> Iterator[Own]:
    """Every image and frame, in the order of their placeholders, from the samples the batch was made of."""
    for number, sample in enumerate(row.samples()):
        for image in sample.images:
            own = image.tensors
            if "image_sizes" in own:
                yield Own(number, image.tokens, own["pixel_values"])
                continue
            if own.keys() & PIXELS and not any(name.endswith("grid_thw") for name in own):
                yield from pictured(number, image)
                continue
            for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
                if pixels not in own:
                    continue  # or a frame whose tensors came with the video's first
                time, height, width = own[f"{kind}_grid_thw"].tolist()
                side = int(own.get(f"{kind}_merge_sizes", torch.tensor(2)))
                stays = own.get("video_compression_mask", torch.ones(time * height * width // side**2))
                if kind == "video" and row.name == "ERNIE-4.5-VL":  # two frames are joined
                    yield from (Own(number, height * width // side**2, part) for part in own[pixels].chunk(time // 2))
                    continue
                for frame in range(time):
                    tokens = 0
                    for place in range(height * width // side**2):
                        tokens += int(stays[frame * (height * width // side**2) + place])
                    if tokens:
                        patches = [own[pixels][frame * height * width + patch] for patch in range(height * width)]
                        yield Own(number, tokens, torch.stack(patches))


def pictured(number: int, image: Image) -> Iterator[Own]:
    """An image whose pixels are pictures or one of its tiles, or the frames of a video."""
    pixels = image.tensors.get("pixel_values", image.tensors.get("small"))
    places = next((value for name, value in image.tensors.items() if name.endswith("position_ids")), None)
    if places is not None and pixels is not None:  # places of patches, -1 for padding
        pixels = pixels[places[:, 0] >= 0]
    if pixels is not None:
        yield Own(number, image.tokens, pixels)
    else:
        frames = image.tensors["pixel_values_videos"]
        frames = frames if places is None else frames[:, places[0, :, 0] >= 0]
        yield from (Own(number, image.tokens // len(frames), frame) for frame in frames)


@pytest.mark.parametrize("row", LAID_OUT, ids=repr)
def test_images_and_frames_are_those_of_a_slow_loop(row: Row) -> None:
    family = find_family(row.model())
    assert isinstance(family, Placeholder)
    inputs = row.inputs(range(len(row.samples())))
    prompt = cast(DecoderPrompt, Prompt(ModelCall(inputs), inputs["input_ids"]))
    counts = {token: int((inputs["input_ids"] == token).sum()) for token in (IMAGE, VIDEO)}
    visual, expected = visual_columns(inputs), list(by_hand(row))
    layout = Layout.of(family.images(prompt, counts), inputs["input_ids"])
    assert len({own.tokens for own in expected}) > 1 or row in ONE_SIZE, "other sizes"
    assert [image.tokens for image in layout.images] == [own.tokens for own in expected]
    assert layout.samples(visual).tolist() == [own.sample for own in expected]
    for image, own in zip(layout.images, expected, strict=True):
        assert torch.equal(image.pixels, own.pixels.to(image.pixels.dtype))


@pytest.mark.parametrize("row", LAID_OUT, ids=repr)
def test_a_budget_is_of_each_image_and_frame_and_its_best_tokens_stay(row: Row) -> None:
    model, inputs = row.model(), row.inputs(range(len(row.samples())))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # none of them is pruned with a warning
        with prune(model, PruningPolicy(scorer="l2-norm", keep=0.5)) as pruning:
            model(**inputs)
    assert pruning.keep is not None and pruning.scores is not None
    place = dict.fromkeys(range(len(row.samples())), 0)
    for own in by_hand(row):
        tokens = slice(place[own.sample], place[own.sample] + own.tokens)
        scores = pruning.scores[own.sample, tokens]
        best = sorted(range(own.tokens), key=lambda token: -scores[token].item())[: (own.tokens + 1) // 2]
        assert pruning.keep[own.sample, tokens].nonzero()[:, 0].tolist() == sorted(best)
        place[own.sample] = tokens.stop
    assert pruning.keep.sum().item() == sum((own.tokens + 1) // 2 for own in by_hand(row))
