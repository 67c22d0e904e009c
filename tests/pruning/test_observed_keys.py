"""Keys of the vision tower that are observed, against hooks and hand computation."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from catp_lightning import PruningPolicy, prune
from catp_lightning.methods.observation import Needs, Signal
from catp_lightning.models import find_family
from tests.support.decoder_oracle import Decoder
from tests.support.families import BY_NAME
from tests.support.matrix import exact
from tests.support.observing import READ_AND_TEXT, SETTINGS, observed
from tests.support.oracles import IMAGE
from tests.support.rows import Row
from tests.support.samples import pictures, prompts
from tests.support.small_configs import GATED, TOWER, clip, siglip

pytestmark = pytest.mark.usefixtures("no_grad", "notes")


def tower_layer(model: PreTrainedModel, layer: int) -> Any:
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower).encoder.layers[layer]


def keys_by_hand(model: PreTrainedModel, layer: int, inputs: Mapping[str, Any]) -> Tensor:
    """Mean over heads of what k_proj of a layer makes of each row of each picture: [P, N, D]."""
    caught: list[Tensor] = []
    attention = tower_layer(model, layer).self_attn
    hook = attention.k_proj.register_forward_hook(lambda module, args, output: caught.append(output))
    model(**inputs)
    hook.remove()
    heads = caught[0].to(torch.promote_types(caught[0].dtype, torch.float32)).split(attention.head_dim, -1)
    assert len(caught) == 1 and len(heads) == attention.num_heads == 4
    return torch.stack(heads).sum(0) / 4


def llava(vision: Any, strategy: str, tokens: int) -> Row:
    def make() -> PreTrainedModel:
        config = hf.LlavaConfig(
            vision_config=vision,
            text_config=hf.LlamaConfig(**GATED),
            image_token_index=IMAGE,
            vision_feature_select_strategy=strategy,
        )
        return hf.LlavaForConditionalGeneration(config)

    return Row(f"{vision.model_type} {strategy}", make, lambda: prompts(pictures(tokens)), Decoder())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("vision", "strategy", "tokens"),
    [("clip", "default", 9), ("clip", "full", 10), ("siglip", "full", 9), ("siglip", "default", 8)],
)
def test_keys_are_those_of_the_towers_layer(vision: str, strategy: str, tokens: int, attention: str) -> None:
    row = llava(clip() if vision == "clip" else siglip(), strategy, tokens)
    model, inputs = row.model(attention=attention), row.inputs()
    (seen,) = observed({Signal.VISION_KEYS: None}, model, inputs)
    assert seen.layers[Signal.VISION_KEYS] == 2  # of three: LLaVA reads the last but one
    for layer in (0, 1):
        expected = keys_by_hand(model, layer, inputs)
        if vision == "clip" and strategy == "full":
            expected[:, 0] = 0  # [CLS] is a token that always stays: it has no key to compare
            assert seen.protected[:, 0].all() and seen.protected.sum() == seen.images
        elif strategy == "default":
            expected = expected[:, 1:]
        found = seen.by_layer(Signal.VISION_KEYS, (layer,))[:, 0]
        assert found.shape == (4, TOWER["hidden_size"] // 4, tokens)
        exact(found.transpose(1, 2), expected, atol=1e-12)
    assert torch.equal(seen.by_layer(Signal.VISION_KEYS, (-1,)), seen.by_layer(Signal.VISION_KEYS, (1,)))


# Of LlavaNext's images: rows and columns of crops, and which columns of patches are left where padding was cut off.
PACKED = [((1, 2), (0, 4)), ((2, 2), (1, 3)), ((1, 2), (0, 4)), ((2, 2), (0, 4))]


def packed_by_hand(keys: Tensor) -> list[list[Tensor | None]]:
    """Keys of crops of four patches, [P, 4, D], as tokens of images lie; None for a newline."""
    images, first = [], 0
    for (down, across), (left, right) in PACKED:
        tokens: list[Tensor | None] = list(keys[first])
        for height in range(2 * down):
            for width in range(left, right):
                crop = first + 1 + height // 2 * across + width // 2
                tokens.append(keys[crop, height % 2 * 2 + width % 2])
            tokens.append(None)
        images.append(tokens)
        first += 1 + down * across
    assert first == len(keys)
    return images


def test_keys_of_crops_are_packed_as_tokens() -> None:
    row = BY_NAME["LlavaNext"]
    model, inputs = row.model(), row.inputs(range(4))  # the last sample has no image
    (seen,) = observed({Signal.VISION_KEYS: (-2, -1)}, model, inputs)
    assert seen.images == len(PACKED)
    for layer in (-2, -1):
        found = seen.by_layer(Signal.VISION_KEYS, (layer,))[:, 0].transpose(1, 2)
        images = packed_by_hand(keys_by_hand(model, 2 + layer, inputs)[:, 1:])
        for image, tokens in enumerate(images):
            assert seen.valid[image].tolist() == [place < len(tokens) for place in range(seen.tokens)]
            assert not found[image, len(tokens) :].any()
            for place, key in enumerate(tokens):
                assert bool(seen.protected[image, place]) == (key is None)
                exact(found[image, place], torch.zeros_like(found[0, 0]) if key is None else key, atol=1e-12)


def test_keys_of_images_that_are_not_cut_are_those_of_their_patches() -> None:
    """LLaVA-OneVision: the first image has nine patches and three rows of six; the pair after it has nine each."""
    row = BY_NAME["LlavaOnevision"]
    model, inputs = row.model(), row.inputs()
    (seen,) = observed({Signal.VISION_KEYS: (-1,)}, model, inputs)
    keys = keys_by_hand(model, seen.layers[Signal.VISION_KEYS] - 1, inputs)
    found = seen.by_layer(Signal.VISION_KEYS, (-1,))[:, 0].transpose(1, 2)
    line = [token for at in range(3) for token in (*keys[1, 3 * at : 3 * at + 3], *keys[2, 3 * at : 3 * at + 3], None)]
    for image, tokens in ((0, [*keys[0], *line]), (1, [*keys[3], None]), (2, [*keys[4], None])):
        for place, key in enumerate(tokens):
            exact(found[image, place], torch.zeros_like(found[0, 0]) if key is None else key, atol=1e-12)
        assert seen.valid[image].sum() == len(tokens)


def test_several_signals_of_one_module_are_observed_at_once() -> None:
    row = BY_NAME["Llava"]
    model, inputs = row.model(attention="eager"), row.inputs()
    both: Needs = {
        Signal.VISION_ATTENTION: (1,),
        Signal.VISION_KEYS: (0, 1),
        Signal.IMAGE_FEATURES: None,
        **READ_AND_TEXT,
        Signal.IMAGE_HASH: None,
    }
    (seen,) = observed(both, model, inputs)
    maps = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    exact(seen.by_layer(Signal.VISION_ATTENTION, (1,))[:, 0], maps[1][:, :, 0, 1:], atol=1e-6)  # eager's is float32
    for layer in (0, 1):
        keys = keys_by_hand(model, layer, inputs)[:, 1:]
        exact(seen.by_layer(Signal.VISION_KEYS, (layer,))[:, 0].transpose(1, 2), keys, atol=1e-12)
    assert torch.equal(seen[Signal.IMAGE_FEATURES], seen[Signal.IMAGE_EMBEDS])
    for signal, layers in both.items():
        (alone,) = observed({signal: layers}, model, inputs)
        for key, value in alone.values.items():
            assert torch.equal(value, seen.values[key]), "what is observed beside a signal does not change it"


@pytest.mark.parametrize("name", ["Llava", "LlavaNext", "LlavaOnevision"])
@pytest.mark.parametrize("settings", [{}, {"use_cache": False}], ids=["cached", "uncached"])
def test_keys_of_beams_are_those_of_forward(name: str, settings: dict[str, Any]) -> None:
    row = BY_NAME[name]
    few = [number for number, sample in enumerate(row.samples()) if len(sample.images) == 1]
    model, inputs = row.model(), row.inputs(few)
    (expected,) = observed({Signal.VISION_KEYS: None}, model, inputs)
    for seen in observed({Signal.VISION_KEYS: None}, model, inputs, **SETTINGS, num_beams=2, **settings):
        found = seen.by_layer(Signal.VISION_KEYS)
        exact(found, expected.by_layer(Signal.VISION_KEYS), atol=1e-12)


def test_keys_of_half_precision_are_averaged_in_single() -> None:
    row = BY_NAME["Llava"]
    model, inputs = row.model(torch.bfloat16), row.inputs(dtype=torch.bfloat16)
    (seen,) = observed({Signal.VISION_KEYS: (-1,)}, model, inputs)
    keys = keys_by_hand(model, 1, inputs)[:, 1:]
    found = seen.by_layer(Signal.VISION_KEYS, (-1,))[:, 0].transpose(1, 2)
    assert found.dtype == torch.float32
    exact(found, keys, atol=1e-6)
    assert not torch.equal(found, found.bfloat16().float()), "rounding would make ties of near keys"


@pytest.mark.parametrize(
    ("vision", "strategy", "tokens", "grid"),
    [
        ("clip", "default", 9, True),
        ("clip", "full", 10, False),
        ("siglip", "full", 9, True),
        ("siglip", "default", 8, False),
    ],
)
def test_a_family_knows_how_many_tokens_an_image_has_and_whether_they_are_a_square(
    vision: str, strategy: str, tokens: int, grid: bool
) -> None:
    row = llava(clip() if vision == "clip" else siglip(), strategy, tokens)
    family = find_family(row.model())
    with prune(row.model(), PruningPolicy("stride", keep=0.5)) as pruning:
        row.model()(**row.inputs([0]))
    assert pruning.last.counts.tolist() == [tokens] == [family.tokens_per_image]
    assert family.has_grid == grid
