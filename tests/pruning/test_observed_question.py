"""The question that rules are shown: the mean embedding of a prompt's text, whatever stands around it."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from catp_lightning.methods.observation import Needs, Signal
from tests.support.families import BY_NAME
from tests.support.matrix import exact
from tests.support.observing import SETTINGS, observed
from tests.support.oracles import Inputs, visual_columns
from tests.support.rows import Row

pytestmark = pytest.mark.usefixtures("no_grad", "notes")
ASKED: Needs = {Signal.QUESTION: None}
NAMES = ("Llava", "LlavaNext", "InternVL", "Gemma3", "Blip2-OPT", "Blip2-T5", "InstructBlip", "Mllama")


def text(inputs: Inputs, sample: int) -> list[int]:
    """Columns of a sample's text after its first image; all of its text if it has no image."""
    real, sees = inputs["attention_mask"][sample].bool(), inputs.get("cross_attention_mask")
    if sees is not None:
        return (real & sees[sample].flatten(1).any(1)).nonzero()[:, 0].tolist()
    visual = visual_columns(inputs)[sample]
    after = visual.cumsum(0) > 0
    own = real & ~visual
    return ((own & after) if bool((own & after).any()) else own).nonzero()[:, 0].tolist()


def expected(row: Row, inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """The mean by hand, float64 [B, D]."""
    embeddings = row.model(dtype).get_input_embeddings()
    return torch.stack(
        [
            embeddings(inputs["input_ids"][sample, text(inputs, sample)]).double().mean(0)
            for sample in range(len(inputs["input_ids"]))
        ]
    )


def frames(row: Row, rows: Sequence[int]) -> list[int]:
    """Sample of each image."""
    return [place for place, number in enumerate(rows) for _ in row.samples()[number].images]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_question_is_the_mean_of_the_texts_embeddings(name: str, dtype: torch.dtype) -> None:
    row = BY_NAME[name]
    rows = [number for number, sample in enumerate(row.samples()) if sample.images]
    inputs = row.inputs(rows, pads=2, dtype=dtype)
    (seen,) = observed(ASKED, row.model(dtype), row.oracle.forward_inputs(inputs))
    found = seen[Signal.QUESTION]
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    means = expected(row, inputs, dtype)[frames(row, rows)]
    exact(found.double(), means, atol=1e-12 if dtype == torch.float64 else 1e-6)
    assert (means[0] - means[-1]).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_batch_padding_beams_and_generated_text_do_not_change_the_question(name: str) -> None:
    row = BY_NAME[name]
    model, rows = row.model(), [number for number, own in enumerate(row.samples()) if len(own.images) == 1]
    (together,) = observed(ASKED, model, row.oracle.forward_inputs(row.inputs(rows)))
    means = together[Signal.QUESTION]
    right = replace(row, samples=lambda: [replace(own, pads_at=len(own.ids)) for own in row.samples()])
    for place, number in enumerate(rows):
        (alone,) = observed(ASKED, model, row.oracle.forward_inputs(row.inputs([number], pads=3)))
        exact(alone[Signal.QUESTION], means[place : place + 1], atol=1e-12)
    if name != "Mllama":  # its rows of the mask are written for padding on the left
        (other,) = observed(ASKED, model, row.oracle.forward_inputs(right.inputs(rows, pads=1)))
        exact(other[Signal.QUESTION], means, atol=1e-12)
    for settings in ({"num_beams": 2}, {"use_cache": False}, {}):
        for seen in observed(ASKED, model, row.inputs(rows), **{**SETTINGS, **settings}):
            exact(seen[Signal.QUESTION], means, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "Blip2-T5"])
def test_answers_that_are_given_as_labels_are_no_part_of_the_question(name: str) -> None:
    row = BY_NAME[name]
    model, rows = row.model(), [number for number, own in enumerate(row.samples()) if own.images]
    inputs = row.inputs(rows)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    (seen,) = observed(ASKED, model, {**inputs, "labels": labels})
    without = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    without["attention_mask"][:, -2:] = 0
    exact(seen[Signal.QUESTION], expected(row, without, torch.float64)[frames(row, rows)], atol=1e-12)
