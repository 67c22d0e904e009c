"""Attention and keys of vision towers by token, after merging, windows, shuffling, pooling and packing."""

from collections.abc import Container
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.models import find_family
from catp_lightning.models.towers import received
from catp_lightning.prompt.attention import OBSERVER, _observing
from tests.support.families import BY_NAME, OLDEST
from tests.support.footprints import footprint
from tests.support.matrix import exact, settled
from tests.support.observing import SETTINGS, observed
from tests.support.oracles import IMAGE
from tests.support.tower_cases import CASES, ROWS, Case, apart, encoder, expected
from tests.support.tower_oracle import attended

pytestmark = pytest.mark.usefixtures("no_grad", "notes")
BOTH: Needs = {Signal.VISION_ATTENTION: None, Signal.VISION_KEYS: None}


def cases(names: Container[str]) -> pytest.MarkDecorator:
    """Every case, slow but for those in `names`."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, id=case.row, marks=() if case.row in names else pytest.mark.slow)
            for case in CASES
            if case.row in ROWS
        ],
    )


every_case = cases({*BY_NAME, "Qwen3-VL, videos", "LightOnOCR"})
every_kind = cases({"Llava", "Qwen2.5-VL", "Qwen3-VL, videos", "InternVL", "Mistral3"})
"""A case by default for each way in which a tower's attention becomes that of tokens."""


def ordered(case: Case, seen: Observation) -> list[int]:
    """The images that are compared."""
    return [place for place in range(seen.images) if case.row != "LlavaNextVideo" or seen.valid[place].sum() == 1]


@every_case
def test_each_token_gets_what_its_patches_get_where_the_tower_reads_the_image_alone(case: Case) -> None:
    row = ROWS[case.row]
    inputs = row.inputs(range(len(row.samples())))  # several images of a sample, and a sample without any
    (seen,) = observed(BOTH, row.model(attention="sdpa"), row.oracle.forward_inputs(inputs))
    images, found = ordered(case, seen), list(expected(case, row))
    assert len(found) == len(images) > 1
    for place, one in zip(images, found, strict=True):
        for signal, layers in ((Signal.VISION_ATTENTION, one.attention), (Signal.VISION_KEYS, one.keys)):
            assert seen.layers[signal] == len(layers) > 0
            values = seen.by_layer(signal)[place]
            own = torch.stack(layers)
            exact(values[..., : own.shape[-1]], own, atol=1e-12)
            assert not values[..., own.shape[-1] :].any() and int(seen.valid[place].sum()) == own.shape[-1]
    assert find_family(row.model()).heads(Signal.VISION_ATTENTION) == one.attention[0].shape[0] == 4
    spread = seen.by_layer(Signal.VISION_ATTENTION).amax(-1) / seen.by_layer(Signal.VISION_ATTENTION).mean(-1)
    assert spread.max() > 1.5, "flat attention would prove nothing"


@every_kind
def test_the_order_of_samples_and_padding_change_nothing(case: Case) -> None:
    """Images are read before videos, wherever their placeholders are."""
    row = ROWS[case.row]
    model, samples = row.model(attention="sdpa"), list(range(len(row.samples())))
    counts = [len(list(apart(sample))) for sample in row.samples()]
    (seen,) = observed(BOTH, model, row.oracle.forward_inputs(row.inputs(samples)))
    (turned,) = observed(BOTH, model, row.oracle.forward_inputs(row.inputs(samples[::-1], pads=3)))
    starts = [sum(counts[:number]) for number in samples]
    order = [starts[number] + place for number in samples[::-1] for place in range(counts[number])]
    for key, value in seen.values.items():
        exact(turned.values[key], value[order], atol=1e-12)


@every_kind
@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"num_beams": 2}], ids=["cached", "uncached", "beams"])
def test_generate_sees_what_forward_does(case: Case, settings: dict[str, Any]) -> None:
    row = ROWS[case.row]
    if "num_beams" in settings and (reason := row.lacks.get("beams_and_sampling_find_what_the_masked_model_finds")):
        pytest.skip(reason)
    repeats = OLDEST and "num_beams" in settings  # of several images it gives a beam the first one twice
    few = [n for n, own in enumerate(row.samples()) if len(own.images) < 2 or not repeats]
    model, inputs = row.model(attention="sdpa"), row.inputs(few)
    (expected,) = observed(BOTH, model, row.oracle.forward_inputs(inputs))
    shown = observed(BOTH, model, inputs, **SETTINGS, **settings)
    assert len(shown) == (2 if "use_cache" in settings else 1)
    for seen in shown:
        for key, value in expected.values.items():
            exact(seen.values[key], value, atol=1e-12)


@every_kind
def test_eager_attention_shows_the_same(case: Case) -> None:
    """Later layers read what eager attention computed, in float32 in most towers."""
    row = ROWS[case.row]
    inputs = row.oracle.forward_inputs(row.inputs())
    (seen,) = observed(BOTH, row.model(attention="sdpa"), inputs)
    (eager,) = observed(BOTH, row.model(attention="eager"), inputs)
    for key, value in seen.values.items():
        first = isinstance(key, tuple) and key[1] == 0 and case.whole is None
        exact(eager.values[key], value, atol=1e-12 if first else 2e-5)


@every_kind
def test_towers_are_left_as_they_were(case: Case) -> None:
    row = ROWS[case.row]
    model = settled(row)
    before = footprint(model)
    observed(BOTH, model, row.oracle.forward_inputs(row.inputs()))
    assert footprint(model) == before


@every_kind
def test_in_half_precision_values_are_single(case: Case) -> None:
    row = ROWS[case.row]
    model, inputs = row.model(torch.bfloat16), row.inputs(dtype=torch.bfloat16)
    (seen,) = observed(BOTH, model, row.oracle.forward_inputs(inputs))
    assert {value.dtype for value in seen.values.values()} == {torch.float32}
    assert all(value.isfinite().all() for value in seen.values.values())


def test_tiles_of_one_run_are_values_of_one_image() -> None:
    row = BY_NAME["InternVL"]
    pair = row.samples()[1]
    joined = replace(pair, ids=[5, 6, *[IMAGE] * 18, 7, 8])
    (apart_,) = observed(BOTH, row.model(), row.inputs([1]))
    (one,) = observed(BOTH, row.model(), replace(row, samples=lambda: [joined]).inputs())
    assert apart_.images == 2 and one.images == 1
    for key, value in one.values.items():
        exact(value[0], torch.cat([*apart_.values[key]], -1), atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SmolVLM", "Idefics3"])
def test_padding_of_a_picture_neither_pays_nor_receives_attention(name: str) -> None:
    row = BY_NAME[name]
    model, inputs = row.model(), row.inputs([0])
    mask = torch.ones(1, 1, 24, 24, dtype=torch.long)
    mask[..., 16:] = 0  # two columns of six patches, a column of three tokens
    real = (torch.arange(36) % 6) < 4
    with attended(encoder(model.model.vision_model)) as blocks:
        model(**inputs, pixel_attention_mask=mask)
    for attention, atol in (("sdpa", 1e-12), ("eager", 2e-5)):
        (seen,) = observed(BOTH, row.model(attention=attention), {**inputs, "pixel_attention_mask": mask})
        for layer, ((maps, _),) in enumerate(blocks):
            paid = maps[0][:, real].mean(1).unflatten(1, (3, 2, 3, 2)).mean((2, 4))  # lines and columns of tokens
            assert not paid[..., 2].any()
            exact(seen.by_layer(Signal.VISION_ATTENTION, (layer,))[0, 0], paid.flatten(1), atol=atol)


def test_pictures_of_a_row_are_told_apart_under_flash_attention() -> None:
    """It is called once for all pictures, with their beginnings; older versions of Pixtral give positions alone."""
    query, key = torch.randn(2, 1, 3, 9, 4, dtype=torch.float64)
    module = nn.Module()
    module.is_causal = False
    given = {"cu_seq_lens_q": torch.tensor([0, 4, 9])}, {"position_ids": torch.tensor([[0, 1, 5, 6, 0, 1, 2, 5, 6]])}
    for kwargs in given:
        pieces: list[Tensor] = []
        module.__dict__[OBSERVER] = (received, pieces.append)
        _observing("sdpa")(module, query, key, key, None, scaling=0.5, **kwargs)
        alone = [received(query[:, :, own], key[:, :, own], None, 0.5) for own in (slice(0, 4), slice(4, 9))]
        assert len(pieces) == 2 and all(map(torch.equal, pieces, alone))


@pytest.mark.parametrize(("layers", "count"), [([-2, 1], 2), ([1], 1), (-1, 3), ([-1, -2, 1], 3)])
def test_of_several_feature_layers_the_deepest_counts(layers: Any, count: int) -> None:
    row = BY_NAME["VipLlava"]
    model = deepcopy(row.model())
    name = "vision_feature_layers" if OLDEST else "vision_feature_layer"
    setattr(model.config, name, layers)
    assert find_family(model).layers() == {Signal.VISION_ATTENTION: count, Signal.VISION_KEYS: count}


def test_frames_of_onevision_are_resampled_beside_images() -> None:
    """Three lines of three patches are made two of two: three quarters of the outer one and a quarter of the middle."""
    row = BY_NAME["LlavaOnevision-video"]
    model = row.model()
    (seen,) = observed(BOTH, model, row.inputs(range(3)))
    assert seen.valid.sum(1).tolist() == [4, 5, 21, 4, 5]  # two frames, a picture in crops, two frames
    share = torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.25, 0.75]], dtype=torch.float64)
    frames = torch.cat([sample.images[-1].tensors["pixel_values_videos"] for sample in row.samples()[:2]]).double()
    for place, frame in zip((0, 1, 3, 4), frames, strict=True):
        with attended(encoder(model.model.vision_tower)) as blocks:
            model.model.vision_tower(frame[None])
        for layer, ((maps, keys),) in enumerate(blocks):
            for signal, own in ((Signal.VISION_ATTENTION, maps[0].mean(1)), (Signal.VISION_KEYS, keys[0].mean(0).T)):
                pooled = torch.einsum("ar,bc,drc->dab", share, share, own.unflatten(1, (3, 3))).flatten(1)
                value = seen.by_layer(signal, (layer,))[place, 0]
                exact(value[:, :4], pooled, atol=1e-12)
                assert not value[:, 4:].any(), "the newline that ends a video has no patch"
