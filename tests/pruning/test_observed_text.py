"""What is observed of tokens and text before the decoder, against hooks and hand computation."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from catp_lightning.methods.observation import Observation, Signal
from tests.support.decoder_oracle import Decoder
from tests.support.encoder_oracles import EncoderDecoder
from tests.support.families import BY_NAME, ROWS
from tests.support.matrix import KIN, exact
from tests.support.observing import READ_AND_TEXT, SETTINGS, observed
from tests.support.oracles import IMAGE, VIDEO, Inputs, hooked, visual_columns
from tests.support.quick import quick
from tests.support.rows import Row
from tests.support.samples import Image, Sample, pictures

pytestmark = pytest.mark.usefixtures("no_grad", "notes")
READERS = [row for row in ROWS if not row.name.startswith("Mllama")]
QUICK = {row.name for row in READERS} - KIN
every_reader = pytest.mark.parametrize("row", quick(READERS, QUICK))


def frames(image: Image) -> list[int]:
    """Visual tokens of an image, or of each frame of a video; what ends a video belongs to its last frame."""
    video, grid = image.tensors.get("pixel_values_videos"), image.tensors.get("video_grid_thw")
    count = 1 if video is None else len(video) if grid is None else int(grid[0])
    if image.placeholder == VIDEO and video is None:  # InstructBLIP's
        count = len(image.tensors["pixel_values"])
    each = image.tokens // count
    return [each] * (count - 1) + [image.tokens - each * (count - 1)]


def text_columns(inputs: Inputs, sample: int, labels: Tensor | None = None) -> list[int]:
    """Columns of a sample's text after its first visual token, else all of its text, up to its first label."""
    visual = visual_columns(inputs)[sample].tolist()
    own: list[int] = []
    after: list[int] = []
    for column, real in enumerate(inputs["attention_mask"][sample].tolist()):
        if labels is not None and labels[sample, column] != -100:
            break
        if real and not visual[column]:
            own.append(column)
            after += [column] if any(visual[:column]) else []
    return after or own


def check_text(
    model: PreTrainedModel, inputs: Inputs, samples: Sequence[Sample], seen: Observation, labels: Tensor | None = None
) -> None:
    """Each image is shown the text of its sample, zeros after it."""
    embeddings, image = model.get_input_embeddings(), 0
    for row, sample in enumerate(samples):
        columns = text_columns(inputs, row, labels)
        expected = embeddings(inputs["input_ids"][row, columns])
        for _ in [frame for one in sample.images for frame in frames(one)]:
            rows = seen[Signal.TEXT_EMBEDS][image]
            assert seen.text[image].tolist() == [place < len(columns) for place in range(len(rows))]
            assert torch.equal(rows[: len(columns)], expected) and not rows[len(columns) :].any()
            image += 1
    assert image == len(seen[Signal.TEXT_EMBEDS]) == len(seen.text) == seen.images


def check_read(row: Row, model: PreTrainedModel, inputs: Inputs, samples: Sequence[Sample], seen: Observation) -> None:
    """Each image's tokens are what the language model is called with in their places, zeros after them."""
    caught: dict[str, Any] = {}
    reader = model.language_model.encoder if isinstance(row.oracle, EncoderDecoder) else None
    reader = model.get_submodule(row.oracle.path) if reader is None else reader
    with hooked([reader], lambda module, args, kwargs: caught.update(kwargs) or {}):
        model(**row.oracle.forward_inputs(inputs))
    image = 0
    for embeds, columns, sample in zip(caught["inputs_embeds"], visual_columns(inputs), samples, strict=True):
        place, own = 0, embeds[columns]
        for tokens in [frame for one in sample.images for frame in frames(one)]:
            read = seen[Signal.IMAGE_EMBEDS][image]
            exact(read[:tokens], own[place : place + tokens], atol=row.tolerance() * embeds.abs().max().item())
            assert not read[tokens:].any() and seen.valid[image].sum() == tokens
            place, image = place + tokens, image + 1
    assert image == len(seen[Signal.IMAGE_EMBEDS])


def padded(row: Row, right: bool) -> Row:
    """The row with padding on the other side of its prompts, if `right`."""
    return replace(row, samples=lambda: [replace(own, pads_at=len(own.ids)) for own in row.samples()]) if right else row


RIGHT = [
    pytest.param(BY_NAME[name], True, id=f"{name}, padded on the right")
    for name in ("Llava", "LlavaNext", "Blip2-OPT", "Blip2-T5", "Qwen2.5-VL", "Gemma3")
]


@pytest.mark.parametrize(("row", "right"), [*(pytest.param(row, False, id=repr(row)) for row in READERS), *RIGHT])
def test_tokens_and_text_are_what_the_language_model_reads(row: Row, right: bool) -> None:
    """Samples of several images and of none among them."""
    row, model = padded(row, right), row.model()
    samples = row.samples()
    inputs = row.inputs(range(len(samples)), pads=2)
    (seen,) = observed(READ_AND_TEXT, model, row.oracle.forward_inputs(inputs))
    check_text(model, inputs, samples, seen)
    check_read(row, model, inputs, samples, seen)
    assert (inputs["attention_mask"] == 0).any() and not seen.text.all(), "texts differ in length"


@every_reader
def test_what_has_been_generated_is_no_text(row: Row) -> None:
    model, samples = row.model(), [sample for sample in row.samples() if sample.images]
    inputs = row.inputs()
    seen = observed(READ_AND_TEXT, model, inputs, **SETTINGS, use_cache=False)
    # BLIP-2's generate hands on embeddings, which newer versions of transformers always decode with a cache.
    assert len(seen) == 2 or model.config.model_type.startswith(("blip", "instructblip"))
    for step in seen:
        check_text(model, inputs, samples, step)
        check_read(row, model, inputs, samples, step)


@every_reader
def test_beams_are_shown_once(row: Row) -> None:
    # Of several images of a sample older versions of generate give a beam the first one twice, unpruned as well.
    few = [number for number, sample in enumerate(row.samples()) if len(sample.images) == 1]
    model, samples, inputs = row.model(), [row.samples()[number] for number in few], row.inputs(few)
    for step in observed(READ_AND_TEXT, model, inputs, **SETTINGS, num_beams=2, use_cache=False):
        check_text(model, inputs, samples, step)
        check_read(row, model, inputs, samples, step)


def labels_from(inputs: Inputs, columns: Sequence[int]) -> Tensor:
    """Labels from these columns on, counted from the end, over what is no padding; some ignored ones among them."""
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, column in enumerate(columns):
        labels[row, column:] = 7
        labels[row, -1] = -100
    return labels.masked_fill(inputs["attention_mask"] == 0, -100)


@pytest.mark.parametrize("row", quick([row for row in READERS if isinstance(row.oracle, Decoder)], QUICK))
def test_text_ends_where_labels_begin(row: Row) -> None:
    model, samples = row.model(), [sample for sample in row.samples() if sample.images]
    inputs = row.inputs()
    length = inputs["input_ids"].shape[1]
    for columns in ([-3, -2, -4], [-2, -length, -3], [-length] * 3):
        labels = labels_from(inputs, columns[: len(samples)])
        (seen,) = observed(READ_AND_TEXT, model, {**inputs, "labels": labels})
        check_text(model, inputs, samples, seen, labels)
    assert not seen.text.any(), "an answer without a question"


@pytest.mark.parametrize("name", ["Blip2-T5", "InstructBlip-T5"])
def test_an_encoder_reads_all_of_the_text_whatever_the_labels(name: str) -> None:
    row = BY_NAME[name]
    model, inputs = row.model(), row.inputs()
    (seen,) = observed(READ_AND_TEXT, model, {**inputs, "labels": row.oracle.labels(inputs)})
    check_text(model, inputs, row.samples(), seen)


def test_text_before_the_image_counts_only_where_none_follows_it() -> None:
    """By hand: three samples of one image; text on both sides, before alone, after alone."""
    images = [own[0] for own in pictures(each=(1, 1, 1))]
    visual = [IMAGE] * 9
    samples = [
        Sample([5, 6, *visual, 7, 8, 9], [images[0]]),
        Sample([10, 11, *visual], [images[1]]),
        Sample([*visual, 12], [images[2]]),
    ]
    row = replace(BY_NAME["Llava"], samples=lambda: samples)
    model = BY_NAME["Llava"].model()
    (seen,) = observed(READ_AND_TEXT, model, row.inputs())
    words = [[7, 8, 9], [10, 11], [12]]
    assert seen.text.sum(1).tolist() == [3, 2, 1]
    for image, ids in enumerate(words):
        assert torch.equal(seen[Signal.TEXT_EMBEDS][image, : len(ids)], model.get_input_embeddings().weight[ids])
