"""The fingerprint of a model."""

from pathlib import Path

import torch
from torch import nn

from catp_lightning.calibration.identity import model_fingerprint
from tests.support.models import faint_blip2


def test_the_fingerprint_of_a_model_depends_on_every_single_weight() -> None:
    model = nn.Linear(101, 97)
    before, weight = model_fingerprint(model), model.weight.data.view(-1)
    for place in range(0, len(weight), 7):
        value = weight[place].clone()
        weight[place] = torch.nextafter(value, torch.tensor(9.0))
        assert model_fingerprint(model) != before, place
        weight[place] = value
    assert model_fingerprint(model) == before


def test_the_fingerprint_of_a_model_depends_on_names_shapes_dtypes_and_places() -> None:
    base = nn.Linear(4, 4, bias=False)
    named, shaped, turned = nn.Sequential(base), nn.Linear(2, 8, bias=False), nn.Linear(4, 4, bias=False)
    shaped.weight.data, turned.weight.data = base.weight.data.view(8, 2), base.weight.data.flip(0)
    half = nn.Linear(4, 4, bias=False).bfloat16()
    half.weight.data = base.weight.data.bfloat16()
    assert len({model_fingerprint(model) for model in (base, named, shaped, turned, half)}) == 5


def test_the_fingerprint_of_a_model_is_that_of_its_values(tmp_path: Path) -> None:
    """A copy has it, another layout in memory and tied weights; every dtype, empty and single values do."""
    model, copy = faint_blip2(), faint_blip2()
    assert model_fingerprint(copy) == model_fingerprint(model)
    copy.language_projection.weight.data = copy.language_projection.weight.data.T.contiguous().T
    assert model_fingerprint(copy) == model_fingerprint(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    odd = nn.Module()
    kinds = (torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.bool, torch.int64)
    for number, kind in enumerate(kinds):
        odd.register_buffer(f"b{number}", torch.tensor([0, 1, 1, 0]).to(kind))
    odd.register_buffer("empty", torch.empty(0, 3))
    odd.register_buffer("single", torch.tensor(2.5))
    before = model_fingerprint(odd)
    for number in range(len(kinds)):
        odd.get_buffer(f"b{number}")[3] = 1
    assert before != model_fingerprint(odd) == model_fingerprint(odd)
    assert model_fingerprint(nn.Linear(2, 2, device="meta")) != model_fingerprint(nn.Linear(2, 3, device="meta"))
