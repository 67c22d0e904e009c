"""What is observed before the decoder, against hooks and hand computation: tokens, text, and keys of the tower."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from catp_lightning import PruningPolicy, prune
from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.scorers import Scorer
from catp_lightning.models import find_family
from tests.support.families import BY_NAME, GATED, ROWS, TOWER, Image, Row, Sample, clip, pictures, prompts, siglip
from tests.support.matrix import exact
from tests.support.oracles import IMAGE, VIDEO, Decoder, EncoderDecoder, Inputs, hooked, visual_columns

pytestmark = pytest.mark.usefixtures("no_grad")
READERS = [row for row in ROWS if not row.name.startswith("Mllama")]
READ_AND_TEXT: Needs = {Signal.IMAGE_EMBEDS: None, Signal.TEXT_EMBEDS: None}
SETTINGS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}
every_reader = pytest.mark.parametrize("row", READERS, ids=repr)


@dataclass(frozen=True)
class Notes(Scorer):
    """Keeps what it is shown and ranks nothing."""

    wanted: ClassVar[Needs] = {}
    seen: ClassVar[list[Observation]] = []

    @property
    def needs(self) -> Needs:
        return self.wanted

    def score(self, seen: Observation) -> Tensor:
        self.seen.append(seen)
        return torch.zeros(seen.images, seen.tokens)


@pytest.fixture(autouse=True)
def _notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PruningPolicy, "build_scorer", lambda policy: Notes())


def observed(needs: Needs, model: PreTrainedModel, inputs: Mapping[str, Any], **settings: Any) -> list[Observation]:
    """What one call shows: of forward, or with settings of generate, which may show several prefills."""
    Notes.seen, Notes.wanted = [], needs
    with prune(model, PruningPolicy(scorer="position", keep=0.5)):
        (model.generate if settings else model)(**inputs, **settings)
    return Notes.seen


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


@every_reader
@pytest.mark.parametrize("right", [False, True], ids=["as it pads", "padded on the right"])
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
    for settings in ({"use_cache": False}, {"use_cache": True}):
        seen = observed(READ_AND_TEXT, model, inputs, **SETTINGS, **settings)
        # BLIP-2's generate hands on embeddings, which newer versions of transformers always decode with a cache.
        once = settings["use_cache"] or isinstance(row.oracle, EncoderDecoder)
        assert len(seen) == (1 if once else 3) or model.config.model_type.startswith(("blip", "instructblip"))
        for step in seen:
            check_text(model, inputs, samples, step)
            check_read(row, model, inputs, samples, step)


@every_reader
@pytest.mark.parametrize("settings", [{}, {"use_cache": False}], ids=["cached", "uncached"])
def test_beams_are_shown_once(row: Row, settings: dict[str, Any]) -> None:
    # Of several images of a sample older versions of generate give a beam the first one twice, unpruned as well.
    few = [number for number, sample in enumerate(row.samples()) if len(sample.images) == 1]
    model, samples, inputs = row.model(), [row.samples()[number] for number in few], row.inputs(few)
    for step in observed(READ_AND_TEXT, model, inputs, **SETTINGS, num_beams=2, **settings):
        check_text(model, inputs, samples, step)
        check_read(row, model, inputs, samples, step)


def labels_from(inputs: Inputs, columns: Sequence[int]) -> Tensor:
    """Labels from these columns on, counted from the end, over what is no padding; some ignored ones among them."""
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, column in enumerate(columns):
        labels[row, column:] = 7
        labels[row, -1] = -100
    return labels.masked_fill(inputs["attention_mask"] == 0, -100)


@pytest.mark.parametrize("row", [row for row in READERS if isinstance(row.oracle, Decoder)], ids=repr)
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


# --- Keys of the vision tower


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
    assert pruning.choices[0][1].tolist() == [tokens] == [family.tokens_per_image]
    assert family.has_grid == grid
